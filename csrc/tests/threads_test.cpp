// Threads: the same results for every number of them, from several callers at once and in a child of fork(); and the
// selection's slow path, which only a test takes.
#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../cpu/kernels.hpp"
#include "check.h"
#include "wsn_fast.h"

namespace {

constexpr int64_t kSize = 400'003;  // enough for several threads
const int64_t kSampled = wsn::sample_size(kSize);

std::vector<float> random_scores(int64_t n) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> scores(static_cast<size_t>(n));
  for (float &score : scores) score = normal(generator);
  return scores;
}

float threshold(const std::vector<float> &scores, int64_t rank, int threads) {
  float tau = NAN;
  CHECK(wsn_threshold(scores.data(), WSN_FLOAT32, int64_t(scores.size()), rank, WSN_VALUE, &tau, threads) == WSN_OK);
  return tau;
}

void check_thread_counts() {
  const std::vector<float> scores = random_scores(kSize);
  std::vector<float> sorted = scores;
  std::sort(sorted.begin(), sorted.end());
  for (const int64_t rank : {int64_t(0), int64_t(1), kSize / 3, kSize - 2, kSize - 1})
    for (const int threads : {1, 2, 3, 8, 1000}) CHECK(threshold(scores, rank, threads) == sorted[size_t(rank)]);
}

// All keys but the sampled ones are small, so that every window misses.
void check_window_that_misses() {
  std::vector<float> scores = random_scores(kSize);
  for (float &score : scores) score = std::fabs(score) + 1;
  std::vector<float> sorted = scores;
  for (int64_t i = 0; i < kSampled; ++i) scores[size_t(wsn::sample_position(i, kSize, kSampled))] = -1e6f - float(i);
  for (const float sign : {1.0f, -1.0f}) {
    for (float &score : scores) score *= sign;
    sorted = scores;
    std::sort(sorted.begin(), sorted.end());
    for (const int threads : {1, 4}) CHECK(threshold(scores, kSize / 2, threads) == sorted[size_t(kSize / 2)]);
  }
}

// Half of the window's keys were not seen by the sample, so that the list overflows.
void check_list_that_overflows() {
  std::vector<float> scores = random_scores(kSize);
  std::vector<float> middle = random_scores(kSize);
  for (int64_t i = 0; i < kSize; ++i) middle[size_t(i)] = middle[size_t(i)] * 1e-6f;
  for (int64_t i = 0; i < kSampled; ++i) {
    const auto position = size_t(wsn::sample_position(i, kSize, kSampled));
    middle[position] = scores[position];
  }
  std::vector<float> sorted = middle;
  std::sort(sorted.begin(), sorted.end());
  for (const int threads : {1, 4}) CHECK(threshold(middle, kSize / 2, threads) == sorted[size_t(kSize / 2)]);
}

// Means as they are, in bfloat16 or in 8 bits.
std::vector<uint8_t> gate_and_step(int threads, int storage) {
  std::vector<float> weight = random_scores(kSize), scores(weight.rbegin(), weight.rend()), grad = weight;
  std::vector<float> out(weight.size()), scales[4];
  std::vector<uint8_t> packed(size_t(kSize + 7) / 8), states[4], result;
  const size_t bytes[] = {4, 2, 1};
  for (auto &state : states) state.resize(weight.size() * bytes[storage]);
  for (auto &scale : scales) scale.resize((weight.size() + WSN_MEANS_BLOCK - 1) / WSN_MEANS_BLOCK, 1.0f);
  const float tau = 0.7f;
  wsn_adamw adamw = {1e-3, 0.9, 0.999, 1e-8, 1e-2, 1, 1};
  CHECK(wsn_gate(weight.data(), 0, scores.data(), 0, &tau, 0, out.data(), 0, packed.data(), kSize, threads) == WSN_OK);
  float next_tau = 0;
  int64_t window[WSN_WINDOW] = {};
  double sums[2];
  const wsn_next next = {out.data(), &next_tau, window, kSize / 2, WSN_FLOAT32};
  const wsn_gated t = {grad.data(), nullptr, weight.data(), scores.data(), &tau, packed.data(), &next, kSize, 1.0, 0, 0, 0};
  CHECK(wsn_gradient_squares(&t, 1, sums, threads) == WSN_OK);
  for (adamw.step = 1; adamw.step <= 5; ++adamw.step) {
    const wsn_adamw_item item = {t, states[0].data(), states[1].data(), states[2].data(), states[3].data(),
                                 adamw, adamw, scales[0].data(), scales[1].data(), scales[2].data(), scales[3].data(),
                                 storage, storage};
    CHECK(wsn_adamw_step(&item, 1, threads) == WSN_OK);
  }
  CHECK(window[WSN_WINDOW - 2] > 0);
  const auto add = [&](const void *data, size_t size) {
    const auto *const first = static_cast<const uint8_t *>(data);
    result.insert(result.end(), first, first + size);
  };
  add(sums, sizeof sums);
  for (const std::vector<float> *part : {&out, &weight, &scores, &scales[0], &scales[1], &scales[2], &scales[3]})
    add(part->data(), part->size() * sizeof(float));
  for (const std::vector<uint8_t> &state : states) add(state.data(), state.size());
  return result;
}

// Small and large tensors in turn. A part that a thread takes may begin in one tensor and end in another.
void check_restore_many() {
  const int64_t sizes[] = {kSize, 5, kSize / 2, 1024, 1, kSize};
  const std::vector<float> saved = random_scores(kSize);
  std::vector<uint8_t> bits(size_t(kSize + 7) / 8);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = uint8_t(i * 37);
  for (const int threads : {1, 2, 3, 8, 1000}) {
    std::vector<std::vector<float>> params;
    std::vector<wsn_restore_item> items;
    for (const int64_t n : sizes) params.emplace_back(size_t(n), -1000.0f);
    for (size_t t = 0; t < params.size(); ++t)
      items.push_back({params[t].data(), saved.data(), t % 2 ? nullptr : bits.data(), 4, sizes[t]});
    CHECK(wsn_restore_frozen_many(items.data(), int64_t(items.size()), threads) == WSN_OK);
    bool right = true;
    for (size_t t = 0; t < params.size(); ++t)
      for (size_t i = 0; i < params[t].size(); ++i)
        right = right && params[t][i] == (t % 2 || bits[i / 8] >> (i % 8) & 1 ? saved[i] : -1000.0f);
    CHECK(right);
  }
}

// Many tensors at once, small ones between large ones: the results of the calls for one tensor.
std::vector<float> gates_and_gradients(int threads) {
  const std::vector<float> weight = random_scores(kSize), scores(weight.rbegin(), weight.rend());
  std::vector<int64_t> sizes(100, 1000);
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] += int64_t(i * i % 977);
  sizes.insert(sizes.begin() + 70, {1, 131072, 131071});
  std::vector<wsn_gate_item> gates;
  std::vector<wsn_backward_item> items;
  int64_t total = 0;
  for (const int64_t n : sizes) total += n;
  std::vector<float> result(size_t(3 * total) + sizes.size(), NAN);
  float *masked = result.data(), *tau = masked + 3 * total;
  for (const int64_t n : sizes) {
    gates.push_back({weight.data(), scores.data(), tau, masked, n, n / 2, 0, 0, 0, WSN_MAGNITUDE});
    items.push_back({weight.data(), weight.data(), scores.data(), tau, nullptr, masked + total, masked + 2 * total, n, 0,
                     0, 0, WSN_MAGNITUDE});
    masked += n, ++tau;
  }
  const auto count = int64_t(sizes.size());
  if (threads > 0) {
    CHECK(wsn_gates(gates.data(), count, threads) == WSN_OK);
    CHECK(wsn_gates_backward(items.data(), count, threads) == WSN_OK);
    return result;
  }
  for (const wsn_gate_item &g : gates) {
    CHECK(wsn_threshold(g.scores, 0, g.n, g.rank, WSN_MAGNITUDE, g.tau, 1) == WSN_OK);
    CHECK(wsn_gate(g.weight, 0, g.scores, 0, g.tau, WSN_MAGNITUDE, g.masked, 0, nullptr, g.n, 1) == WSN_OK);
  }
  for (const wsn_backward_item &b : items)
    CHECK(wsn_gate_backward(b.grad, 0, b.weight, 0, b.scores, 0, b.tau, WSN_MAGNITUDE, nullptr, b.dweight, b.dscores,
                            b.n, 1) == WSN_OK);
  return result;
}

void check_many_tensors() {
  const std::vector<float> expected = gates_and_gradients(0);
  for (const int threads : {1, 2, 1000}) {
    const std::vector<float> found = gates_and_gradients(threads);
    CHECK(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0);
  }
}

void check_callers_at_once() {
  for (const int storage : {WSN_MEANS_PLAIN, WSN_MEANS_BFLOAT16, WSN_MEANS_8BIT}) {
    const std::vector<uint8_t> expected = gate_and_step(1, storage);
    std::vector<std::thread> callers;
    std::vector<int> same(4);
    for (size_t i = 0; i < same.size(); ++i)
      callers.emplace_back([&, i] { same[i] = gate_and_step(1 + int(i), storage) == expected; });
    for (std::thread &caller : callers) caller.join();
    for (const int equal : same) CHECK(equal);
  }
}

// The loops for AVX2 and AVX-512, which both fuse products and sums, store the same bits.
void check_instruction_sets() {
  const int best = wsn_limit_instructions(-1);
  for (const int storage : {WSN_MEANS_PLAIN, WSN_MEANS_BFLOAT16, WSN_MEANS_8BIT}) {
    const std::vector<uint8_t> expected = gate_and_step(2, storage);
    wsn_limit_instructions(1);
    const std::vector<uint8_t> found = gate_and_step(2, storage);
    wsn_limit_instructions(best);
    CHECK(std::memcmp(found.data() + 16, expected.data() + 16, expected.size() - 16) == 0);  // but for the sums
  }
}

// The pool of the parent is in use before; a child that waits for its threads would wait for ever.
void check_fork() {
#ifndef _WIN32
  const std::vector<float> scores = random_scores(kSize);
  const float expected = threshold(scores, kSize / 2, 4);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(threshold(scores, kSize / 2, 4) == expected ? 0 : 1);
  }
  int status = -1;
  CHECK(child > 0 && waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
#endif
}

}  // namespace

int main() {
  check_thread_counts();
  check_window_that_misses();
  check_list_that_overflows();
  check_restore_many();
  check_many_tensors();
  check_callers_at_once();
  check_instruction_sets();
  check_fork();
  return report();
}
