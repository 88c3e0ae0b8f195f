#!/bin/sh
# The C tests of the native library, plain and under the sanitizers. Usage: csrc/tests/sanitize.sh [build folder]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$(mktemp -d)}
for sanitizer in "" address,undefined thread; do
  folder="$build/$(echo "${sanitizer:-plain}" | tr , -)"  # a comma would split the linker's options
  echo "== ${sanitizer:-no sanitizer}"
  cmake -S "$root" -B "$folder" -DWSN_TESTS=ON -DWSN_SANITIZE="$sanitizer" >/dev/null
  cmake --build "$folder" --target wsn_cpu abi_test sizes_test threads_test >/dev/null
  (cd "$folder" && ctest --output-on-failure --no-tests=error)
done
