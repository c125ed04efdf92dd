#!/usr/bin/env bash
# Build an sdist, from it a wheel in a clean environment outside the source tree, install that, and run what a user
# would first. PYTHON packs (it has the build tools); TORCH is the requirement the clean environment installs first.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
python=$(realpath --no-symlinks "${PYTHON:-python3}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m build --no-isolation --sdist --outdir "$scratch/dist" . >"$scratch/build.log" 2>&1 || {
  tail -n 40 "$scratch/build.log"
  exit 1
}

"$python" -m venv "$scratch/env"
env_python=$scratch/env/bin/python
pip() { "$env_python" -m pip "$@" --quiet --disable-pip-version-check; }
pip install "${TORCH:-torch==2.13.0}"

cd "$scratch"
echo "--- sdist"
pip install "setuptools>=77" wheel ninja "pybind11>=2.12"
pip wheel --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz
ls dist

echo "--- wheel"
pip uninstall --yes wheel ninja pybind11
pip install dist/*.whl
# no compiler, no build tool: an empty PATH but for the environment's own
PATH=$scratch/env/bin "$env_python" "$root/tests/packaging/smoke.py"
PATH=$scratch/env/bin "$scratch/env/bin/burnish" doctor >doctor.txt || {
  cat doctor.txt
  exit 1
}
echo "the sdist builds where the build tools alone are, and its wheel runs where they are not"
