// The CUDA selection on the CPU, for the sanitizers (README.md has the commands). Exits 0, or names what failed.
#include "../../cuda/select.cu"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace {

constexpr int64_t kChunk = 1024;

struct Buffer {  // 16-byte aligned, and no larger than asked for: the address sanitizer sees what is beyond
  explicit Buffer(int64_t bytes) : at(std::aligned_alloc(16, (bytes + 15) / 16 * 16)) {}
  ~Buffer() { std::free(at); }
  Buffer(const Buffer &) = delete;
  void *at;
};

// Several tensors and what the library remembers of them.
struct Model {
  std::vector<std::vector<float>> scores;
  std::vector<int64_t> sizes, ranks;
  int64_t state_bytes = 0;
  Buffer *state;

  Model(std::vector<std::vector<float>> values, double share) : scores(std::move(values)) {
    for (const auto &tensor : scores) {
      sizes.push_back(static_cast<int64_t>(tensor.size()));
      ranks.push_back(static_cast<int64_t>(share * static_cast<double>(tensor.size() - 1)));
    }
    wsn_cuda_select_state_bytes(count(), &state_bytes);
    state = new Buffer(state_bytes);
    std::memset(state->at, 0, state_bytes);
  }
  ~Model() { delete state; }
  Model(const Model &) = delete;

  int64_t count() const { return static_cast<int64_t>(sizes.size()); }
  const wsn_cuda_select_record &record(int64_t i) const {
    return static_cast<const wsn_cuda_select_record *>(state->at)[i];
  }

  // True if every threshold is the key of its rank.
  bool select(int rule, bool warm) {
    int64_t bytes = 0;
    wsn_cuda_select_workspace_bytes(sizes.data(), count(), WSN_CUDA_FLOAT32, kChunk, &bytes);
    const Buffer workspace(bytes);
    std::memset(workspace.at, 0xff, bytes);
    std::vector<float> tau(sizes.size(), -123);
    std::vector<const void *> addresses;
    for (const auto &tensor : scores) addresses.push_back(tensor.data());
    const int error =
        wsn_cuda_select(addresses.data(), sizes.data(), ranks.data(), count(), WSN_CUDA_FLOAT32, rule, warm, kChunk,
                        state->at, workspace.at, bytes, tau.data(), nullptr);
    bool right = error == WSN_CUDA_OK;
    for (int64_t i = 0; i < count(); ++i) {
      std::vector<float> keys = scores[i];
      if (rule == WSN_CUDA_MAGNITUDE)
        for (float &key : keys) key = std::fabs(key);
      std::nth_element(keys.begin(), keys.begin() + ranks[i], keys.end());
      right = right && tau[i] == keys[ranks[i]];
    }
    const Count *counts = reinterpret_cast<const Count *>(static_cast<const Record *>(state->at) + count());
    right = right && std::all_of(counts, counts + count() * kBins, [](Count c) { return c == 0; });
    return right;
  }
};

int failures = 0;

void check(bool condition, const char *what) {
  if (!condition) std::printf("failed: %s\n", what), ++failures;
}

std::mt19937 generator(1);

std::vector<float> normal(int64_t n, float deviation = 1) {
  std::vector<float> x(n);
  for (float &v : x) v = std::normal_distribution<float>(0, deviation)(generator);
  return x;
}

std::vector<std::vector<float>> mixture() {
  std::vector<std::vector<float>> tensors{{0.5f}, {-1, -1, 2}, std::vector<float>(2500, -0.25f)};
  for (const int64_t n : {33, 1024, 1025, 3000}) tensors.push_back(normal(n));
  return tensors;
}

void cold_calls() {
  for (const int rule : {WSN_CUDA_MAGNITUDE, WSN_CUDA_VALUE}) {
    for (const double share : {0.0, 0.7, 1.0}) {
      Model model(mixture(), share);
      check(model.select(rule, false), "cold");
      check(model.record(0).colds == 1 && model.record(6).colds == 1, "cold calls are counted");
    }
  }
}

void warm_calls() {
  Model model(mixture(), 0.7);
  for (int step = 0; step < 6; ++step) {
    check(model.select(WSN_CUDA_MAGNITUDE, true), "warm");
    for (auto &tensor : model.scores)
      for (float &x : tensor) x *= 1.0001f;
  }
  check(model.record(6).hits == 5 && model.record(6).misses == 0 && model.record(6).colds == 1, "slow scores hit");
  for (float &x : model.scores[6]) x *= 3;
  check(model.select(WSN_CUDA_MAGNITUDE, true), "after a jump");
  check(model.record(6).misses == 1, "a jump misses");
}

void many_tensors() {
  std::vector<std::vector<float>> tensors;
  for (int i = 0; i < kGroup + 3; ++i) tensors.push_back(normal(1 + i % 50));
  Model model(std::move(tensors), 0.3);
  check(model.select(WSN_CUDA_VALUE, true) && model.select(WSN_CUDA_VALUE, true), "more tensors than a launch takes");
}

}  // namespace

int main() {
  cold_calls();
  warm_calls();
  many_tensors();
  return failures != 0;
}
