"""Comparing what a model answered."""

# Adapters are float32 here, on disk and in the engine, so that only the order of sums differs.
TOLERANCE = 1e-3


def assert_same(found: dict[str, list], expected: dict[str, list]) -> None:
    assert found["tokens"] == expected["tokens"]
    assert all(abs(a - b) < TOLERANCE for a, b in zip(found["logprobs"], expected["logprobs"], strict=True))


def assert_unlike(found: dict[str, list], other: dict[str, list]) -> None:
    pairs = zip(found["logprobs"], other["logprobs"], strict=True)
    assert found["tokens"] != other["tokens"] or any(abs(a - b) > 20 * TOLERANCE for a, b in pairs)
