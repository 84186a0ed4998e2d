"""What the compiled core was built against; CMake writes the module from cpp/bindings/build_info.py.in."""

TORCH_VERSION: str
CUDA: bool
