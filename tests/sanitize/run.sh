#!/usr/bin/env bash
# Build the native libraries with AddressSanitizer and UndefinedBehaviorSanitizer, apart from the ordinary ones, and run
# the conformance kit and its fuzzer on them: the CPU kernels at every instruction set of this machine, the CUDA kernels
# emulated. These stages run side by side; a finding ends its stage, and in the end fails the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath --no-symlinks "${PYTHON:-python3}")
examples=${EXAMPLES:-200}
out=$PWD/build/sanitize
compiler=${CXX:-g++}

mkdir -p "$out"
BURNISH_SANITIZE=1 "$python" setup.py --quiet build_ext --build-temp "$out/objects" --build-lib "$out/native" \
  >"$out/build.log" 2>&1 || {
  tail -n 40 "$out/build.log"
  exit 1
}
rm -rf "$out/lib" && mkdir "$out/lib"
cp -r python/burnish "$out/lib/"
cp -r kernels/*/ "$out/lib/burnish/kernels/"
rm -f "$out"/lib/burnish/*.so
cp "$out"/native/burnish/*.so "$out/lib/burnish/"

# the runtimes go first; libstdc++ with them, or ASan does not find the __cxa_throw that it wraps
runtimes=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so)
runtimes=$runtimes:$("$compiler" -print-file-name=libstdc++.so)

sanitized() {
  # torch keeps memory until exit: leaks are not looked for
  env LD_PRELOAD="$runtimes" PYTHONPATH="$out/lib" PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1:allocator_may_return_null=1 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 "$@"
}

echo "--- the sanitizers are on"
sanitized "$python" - "$out" <<'CHECK'
import ctypes, pathlib, sys
import torch
import burnish

assert burnish.__file__.startswith(sys.argv[1]), burnish.__file__
library = (pathlib.Path(burnish.__file__).parent / "_native.so").read_bytes()
assert b"__asan_" in library, "the library was built without AddressSanitizer"
assert b"__ubsan_" in library, "the library was built without UBSan"
assert hasattr(ctypes.CDLL(None), "__asan_init"), "AddressSanitizer is not loaded"
x = torch.randn(3, 17)
print(torch.ops.burnish.cpu_isa(), burnish.ops.int8_quantize_rows(x)[1].shape)
CHECK

levels=$(sanitized "$python" -c '
import torch, burnish
levels = ["generic", "avx2", "avx512"]
print(*levels[: levels.index(torch.ops.burnish.cpu_isa()) + 1])')

rules=(--only=forward --only=guard --only=layout --only=special --only=gradient --only=deterministic --only=huge --only=invalid)
stage() {
  if [[ $1 == emulated ]]; then
    BURNISH_EMULATE_CUDA=1 sanitized "$python" -m burnish.testing --backend native --schedules 2 --only forward \
      --only layout
  else
    BURNISH_CPU_ISA=$1 sanitized "$python" -m burnish.testing --backend cpu --fuzz "$examples" "${rules[@]}"
  fi
}

# each is one process, and takes the better part of an hour
declare -A running
for name in $levels emulated; do
  stage "$name" 2>&1 | sed -u "s/^/$name: /" &
  running[$name]=$!
done
failed=()
for name in "${!running[@]}"; do
  wait "${running[$name]}" || failed+=("$name")
done
if ((${#failed[@]})); then
  echo "found something: ${failed[*]}"
  exit 1
fi
echo "ASan and UBSan found nothing"
