#!/usr/bin/env bash
# Build the native libraries with AddressSanitizer and UndefinedBehaviorSanitizer, apart from the ordinary ones, and run
# every op on them, by the conformance kit and its fuzzer: the CPU kernels at every instruction set of this machine, the
# CUDA kernels emulated. An op at a level is one process, JOBS of which run side by side; a finding ends its process, is
# printed whole, and in the end fails the run. OPS, LEVELS and EXAMPLES narrow or widen it:
#
#     OPS="lora_linear lora_linear_backward" LEVELS="avx2 emulated" EXAMPLES=2000 make sanitize
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath --no-symlinks "${PYTHON:-python3}")
export python out=$PWD/build/sanitize examples=${EXAMPLES:-50}
compiler=${CXX:-g++}

mkdir -p "$out"
# the sanitizers look at what the source does, and -O3 would take many times as long to compile what they add
CXXFLAGS="-O1 ${CXXFLAGS:-}" BURNISH_SANITIZE=1 "$python" setup.py --quiet build_ext --build-temp "$out/objects" \
  --build-lib "$out/native" >"$out/build.log" 2>&1 || {
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
export runtimes=$runtimes:$("$compiler" -print-file-name=libstdc++.so)

sanitized() {
  # torch keeps memory until exit: leaks are not looked for. Tensors are ASan's, Python's own objects need not be
  env LD_PRELOAD="$runtimes" PYTHONPATH="$out/lib" \
    ASAN_OPTIONS="detect_leaks=0:strict_string_checks=1:allocator_may_return_null=1:${asan:-}" \
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

echo "--- they see arrays within the memory that a thread keeps"
"$compiler" -std=c++20 -g -O1 -fsanitize=address -Icsrc tests/sanitize/scratch.cpp -o "$out/scratch"
"$out/scratch"
for deed in between beyond stale unreserved; do
  if "$out/scratch" "$deed" >"$out/scratch.log" 2>&1; then
    echo "the deed '$deed' of tests/sanitize/scratch.cpp was not seen"
    exit 1
  fi
done

# NUMBER OF LEVEL OP: one process; a line if it found nothing, all that it printed if it did. Its rules give native code
# the shapes, strides, threads and values that no other does: what the rest of the kit adds is a look at the results,
# which the ordinary tests take. deterministic has every case on the CPU, guard every case of emulated kernels.
check() {
  local log=$out/logs/$3-$4 status=0
  if [[ $3 == emulated ]]; then
    # adagrad_step takes 11 s of CPU time; over 85 with special values, which `make emulate` tries
    export BURNISH_EMULATE_CUDA=1
    local rules=(--backend=native --schedules=1 --only=guard)
  else
    # the frames that GCC 12 lays apart for this are aligned to 32 bytes, and AVX-512 stores to arrays in them by 64
    export BURNISH_CPU_ISA=$3 asan=detect_stack_use_after_return=$([[ $3 == avx512 ]] && echo 0 || echo 1)
    local rules=(--backend=cpu --fuzz="$examples" --only=deterministic --only=double_backward --only=special
      --positions=2)
  fi
  rules+=(--only=layout --only=huge --only=invalid)
  sanitized "$python" -m burnish.testing "$4" "${rules[@]}" >"$log" 2>&1 || status=$?
  if ((status != 0)); then
    cat "$log"
    echo "$1/$2 $3 $4: found something"
    return 1
  fi
  echo "$1/$2 $3 $4: $(tail -n 1 "$log")"
}
export -f sanitized check

rm -rf "$out/logs" && mkdir "$out/logs"
sanitized "$python" - >"$out/checks" <<'LIST'
import os
import torch
from burnish import registry

levels = ["generic", "avx2", "avx512"]
levels = ["emulated", *levels[levels.index(torch.ops.burnish.cpu_isa()) :: -1]]
specs = [spec for spec in registry.all_ops().values() if spec.stem in os.environ.get("OPS", spec.stem).split()]
for level in os.environ.get("LEVELS", " ".join(levels)).split():
    for spec in specs:
        if level != "emulated" or any(impl.backend == "native" for impl in spec.impls):
            print(level, spec.name)
LIST
total=$(wc -l <"$out/checks")
nl -ba -w 1 -s " $total " "$out/checks" | xargs -L 1 -P "${JOBS:-2}" bash -c 'check "$@"' check || {
  echo "found something: $out/logs has what each printed"
  exit 1
}
echo "ASan and UBSan found nothing"
