#!/bin/sh
# Install csulora from its wheel, with the extra `signing`, into a new virtual environment. The Containerfile runs this.
#
#     sh install.sh VENV WHEELS
#
# WHEELS is a directory with one wheel for this Python. TORCH names the version; a build for CPUs is enough.
# Where torch's plain wheel brings CUDA, let PIP_INDEX_URL name an index that has it for CPUs.
set -eu

venv=$1
wheel=$(ls "$2"/csulora-*-cp"$(python3 -c 'import sys; print("%d%d" % sys.version_info[:2])')"-*.whl)

python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --no-cache-dir "torch==${TORCH:-2.13.0}"
"$venv/bin/pip" install --quiet --no-cache-dir "$wheel[signing]"
"$venv/bin/csulora" doctor
