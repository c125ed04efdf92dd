#!/usr/bin/env bash
# Build wheel and sdist, install each in a clean environment outside the source tree, and run what a user would first.
# PYTHON builds (it has the build tools); TORCH is the requirement the clean environment installs first.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
python=$(realpath --no-symlinks "${PYTHON:-python3}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m build --no-isolation --outdir "$scratch/dist" . >"$scratch/build.log" 2>&1 || {
  tail -n 40 "$scratch/build.log"
  exit 1
}
ls "$scratch/dist"

"$python" -m venv "$scratch/env"
env_python=$scratch/env/bin/python
pip() { "$env_python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip "${TORCH:-torch==2.13.0}"

cd "$scratch"
check() {
  # no compiler, no build tool: an empty PATH but for the environment's own
  PATH=$scratch/env/bin "$env_python" "$root/tests/packaging/smoke.py"
  PATH=$scratch/env/bin "$scratch/env/bin/burnish" doctor >doctor.txt || {
    cat doctor.txt
    exit 1
  }
}

echo "--- wheel"
pip dist/*.whl
check

echo "--- sdist"
"$env_python" -m pip uninstall --quiet --yes burnish
pip "setuptools>=77" wheel ninja "pybind11>=2.12"
pip --no-build-isolation dist/*.tar.gz
check
echo "wheel and sdist install and run"
