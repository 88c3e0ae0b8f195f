// The kernel that finds exact thresholds of many tensors at once.
//
// The key of a given rank is found digit by digit, 11 bits at a time. An interval of keys [low, low + 2^bits) that
// holds it begins as all keys and is narrowed by each launch: its blocks, one for each chunk of a tensor, count the
// next digit of the keys inside, and the last block of a tensor to finish looks up in the counts which digit the rank
// falls on. The interval is in the tensor's record, on the device, so nothing returns to the host, and the number of
// launches does not depend on the tensors.
//
// From the second digit on a block also lists the keys inside the interval, in room of its own for an eighth of its
// chunk, and later launches read the list instead of the scores. So float32 is read twice and not three times. A block
// whose list overflowed reads its chunk again: many equal keys cost one reading more, and never another path.
//
// A warm call begins with an interval around the last threshold instead, and counts the keys below it too. Mostly the
// rank is inside, and one reading is enough. Otherwise the first interval is all keys again. The window reaches 8 to 16
// times as far to either side as the threshold has moved of late.
//
// The counts are sums of integers, so the result does not depend on the order of the blocks. Equal keys do not slow the
// counting: nvcc compiles a shared atomicAdd of 1 to ATOMS.POPC.INC, which adds the lanes of an address at once.
#pragma once

#include <cuda_runtime.h>

#include "keys.cuh"
#include "wsn_fast_cuda.h"

#ifndef WSN_SELECT_THREADS
#define WSN_SELECT_THREADS 512
#endif

namespace {

using Record = wsn_cuda_select_record;
using Count = unsigned long long;  // what 64-bit atomicAdd takes

constexpr int kThreads = WSN_SELECT_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 1 << kDigit;
constexpr int kBinsEach = kBins / kThreads;
constexpr int kUnroll = 4;      // 16-byte loads in flight per thread
constexpr int kListShare = 8;   // a list has room for an eighth of its chunk
constexpr int kMaxWindow = 20;  // bits; of float32, an eighth of an octave. Wider ones would overflow the lists
constexpr int kGroup = 128;     // tensors per launch: their description must fit in 4 KiB of arguments
constexpr unsigned kWarp = 0xffffffffu;

enum Launch { kCold, kWarm, kNext };             // the first of a cold call, the first of a warm one, all others
enum Phase { kStart, kScores, kListed, kDone };  // count all keys, those inside, those listed; nothing is left to do

struct Group {
  const void *scores[kGroup];
  int64_t size[kGroup];
  int64_t rank[kGroup];
  int32_t first_block[kGroup + 1];
  int32_t count;
  int32_t chunk;
  Record *records;   // [count]
  Count *counts;     // [count][kBins], zero between launches
  uint32_t *lists;   // [blocks][chunk / kListShare]
  uint32_t *listed;  // [blocks] keys inside the interval, listed as far as there is room
  void *tau;         // [count]
};
static_assert(sizeof(Group) <= 4096 - 16, "the arguments of a launch have 4 KiB");

struct Interval {
  uint32_t low;
  int bits;   // its width is 2^bits
  int shift;  // bits that remain after the next digit
};

__device__ __forceinline__ Interval interval(uint32_t low, int bits) {
  return {low, bits, bits > kDigit ? bits - kDigit : 0};
}

// What a block does in one launch.
struct Work {
  Interval interval;
  bool all;     // the interval is all keys
  bool window;  // the interval is a warm call's window
  bool cold;    // the first launch of a cold call
  bool list;    // list the keys inside
  bool from_list;
  bool none;    // there is nothing to do
};

struct Shared {
  uint32_t counts[kBins];
  Count sums[kWarps];
  uint32_t below, listed;
  bool last;
  Work work;  // here and not in registers, which the loads in flight need
};

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

// Append the keys of the warp's lanes that `mine` marks, bit j for keys[j]. All lanes take part.
template <int N>
__device__ __forceinline__ void append(const uint32_t (&keys)[N], uint32_t mine, uint32_t *list, uint32_t room,
                                       uint32_t *listed) {
  if (!__any_sync(kWarp, mine)) return;
  uint32_t before = 0, total = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const uint32_t votes = __ballot_sync(kWarp, mine >> j & 1);
    before += __popc(votes & ((1u << lane()) - 1));
    total += __popc(votes);
  }
  uint32_t begin = lane() == 0 ? atomicAdd(listed, total) : 0;
  begin = __shfl_sync(kWarp, begin, 0) + before;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (mine >> j & 1) {
      if (begin < room) list[begin] = keys[j];
      ++begin;
    }
  }
}

// Count N keys of this thread, if they are valid, and list those inside where there is a list. All lanes take part.
// Returns how many are below the interval.
template <bool kAll, int N>
__device__ __forceinline__ uint32_t visit(const uint32_t (&keys)[N], bool valid, const Interval &in, Shared &shared,
                                          uint32_t *list, uint32_t room) {
  if (kAll) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (valid) atomicAdd(&shared.counts[keys[j] >> in.shift], 1u);
    }
    return 0;
  }
  uint32_t below = 0, mine = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const uint32_t offset = keys[j] - in.low;  // wraps far beyond the interval for a key below it
    const bool inside = valid && offset >> in.bits == 0;
    below += valid && keys[j] < in.low;
    if (inside) atomicAdd(&shared.counts[offset >> in.shift], 1u);
    mine |= static_cast<uint32_t>(inside) << j;
  }
  if (list != nullptr) append(keys, mine, list, room, &shared.listed);
  return below;
}

// Visit the chunk's scores: 16 bytes at a time, and singly before the first such boundary and after the last.
template <class K, bool kAll, class Bits>
__device__ __forceinline__ uint32_t visit_scores(const Bits *scores, int items, Shared &shared, uint32_t *list,
                                                 uint32_t room) {
  const Interval in = shared.work.interval;
  constexpr int kEach = 16 / sizeof(Bits);
  const int to_boundary = static_cast<int>((16 - reinterpret_cast<uintptr_t>(scores) % 16) % 16 / sizeof(Bits));
  const int head = to_boundary < items ? to_boundary : items;
  const int vectors = (items - head) / kEach;
  const uint4 *const aligned = reinterpret_cast<const uint4 *>(scores + head);
  uint32_t below = 0;
  for (int first = 0; first < vectors; first += kUnroll * kThreads) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * kThreads + threadIdx.x;
      loaded[u] = i < vectors ? __ldg(aligned + i) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t words[4] = {loaded[u].x, loaded[u].y, loaded[u].z, loaded[u].w};
      uint32_t keys[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        keys[j] = K::of(kEach == 4 ? words[j] : words[j / 2] >> j % 2 * 16 & 0xffff);
      }
      const int i = first + u * kThreads + threadIdx.x;
      below += visit<kAll>(keys, i < vectors, in, shared, list, room);
    }
  }
  const int rest = items - vectors * kEach;  // fewer than 32
  if (threadIdx.x < 32) {
    const int i = lane() < head ? lane() : lane() + vectors * kEach;
    const uint32_t keys[1] = {lane() < rest ? K::of(scores[i]) : 0};
    below += visit<kAll>(keys, lane() < rest, in, shared, list, room);
  }
  return below;
}

// Narrow the record's interval to the bin that its rank falls on; one thread calls it, with the rank inside the bin.
__device__ void settle(Record &record, const Work &work, int bin, int64_t rank) {
  const Interval in = work.interval;
  record.low = in.low + (static_cast<uint32_t>(bin) << in.shift);
  record.bits = in.shift;
  record.rank = rank;
  record.phase = in.shift == 0 ? kDone : work.list || work.from_list ? kListed : kScores;
}

// Remember a threshold, and how wide a window the next warm call should try.
template <int kKeyBits>
__device__ void remember(Record &record) {
  const uint32_t key = record.low;
  const uint32_t moved = key > record.last ? key - record.last : record.last - key;
  const uint32_t faded = record.motion - record.motion / 8;
  record.motion = !record.known ? 1u << (kMaxWindow - 5) : moved > faded ? moved : faded;
  record.last = key;
  record.known = 1;
  const int bits = 36 - __clz(record.motion);  // half of 2^bits is 8 to 16 times the motion
  record.window = kKeyBits <= 16 || bits < kDigit ? kDigit : bits > kMaxWindow ? 0 : bits;
}

// Add up `mine` over the threads before this one, and over all of them into `total`.
__device__ Count sum_before(Count mine, Count &total, Shared &shared) {
  Count until = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Count other = __shfl_up_sync(kWarp, until, distance);
    if (lane() >= distance) until += other;
  }
  if (lane() == 31) shared.sums[threadIdx.x / 32] = until;
  __syncthreads();
  Count before = until - mine;
  total = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < static_cast<int>(threadIdx.x / 32)) before += shared.sums[warp];
    total += shared.sums[warp];
  }
  return before;
}

// The last block of a tensor looks up the digit on which the rank falls, clears the counts and updates the record.
template <class K, class Bits>
__device__ void choose(Record &record, Count *counts, int64_t rank, Bits *tau, Shared &shared) {
  const Work &work = shared.work;
  Count each[kBinsEach], mine = 0, total;
#pragma unroll
  for (int j = 0; j < kBinsEach; ++j) {
    Count *const count = counts + threadIdx.x * kBinsEach + j;
    mine += each[j] = __ldcg(count);  // from L2, where the other blocks added to it
    *count = 0;
  }
  Count before = sum_before(mine, total, shared);
  if (!work.all && !work.window) rank = record.rank;
  if (work.window) rank -= static_cast<int64_t>(__ldcg(reinterpret_cast<Count *>(&record.below)));
  const Count wanted = static_cast<Count>(rank);
  const bool hit = rank >= 0 && wanted < total;
  __syncthreads();  // every thread has read the record
  if (threadIdx.x == 0) {
    record.below = 0;
    record.colds += work.cold;
    record.hits += work.window && hit;
    record.misses += work.window && !hit;
    record.inside += work.window ? static_cast<int64_t>(total) : 0;
    if (!hit) record.phase = kStart;
  }
#pragma unroll
  for (int j = 0; j < kBinsEach; ++j) {
    if (hit && before <= wanted && wanted < before + each[j]) {  // true in one thread, for one j
      settle(record, work, threadIdx.x * kBinsEach + j, static_cast<int64_t>(wanted - before));
      if (work.interval.shift == 0) {
        remember<K::kBits>(record);
        *tau = K::to(record.low);
      }
    }
    before += each[j];
  }
}

// What this block has to do. `launch` tells the first look at the record in this call from later ones. For one thread.
template <class K>
__device__ Work plan(Launch launch, Record &record, bool first_block) {
  const bool lists = K::kBits > 16;
  Work work = {};
  if (launch == kWarm && record.window != 0) {
    const uint32_t half = 1u << (record.window - 1), highest = K::kMax - (2 * half - 1);
    const uint32_t low = record.last > half ? record.last - half : 0;
    work.interval = interval(low < highest ? low : highest, record.window);
    work.window = true;
    work.list = lists && work.interval.shift > 0;
  } else if (launch == kWarm) {
    work.none = true;
    if (first_block) {  // no other block reads these in this launch
      record.phase = kStart;
      ++record.colds;
    }
  } else if (launch == kCold || record.phase == kStart) {
    work.interval = interval(0, K::kBits);
    work.all = true;
    work.cold = launch == kCold;
  } else {
    work.none = record.phase == kDone;
    work.interval = interval(record.low, record.bits);
    work.from_list = record.phase == kListed;
    work.list = lists && work.interval.shift > 0 && !work.from_list;
  }
  return work;
}

// Where a block's keys come from.
template <class Bits>
struct Chunk {
  const Bits *scores;
  int items;
  uint32_t *list;  // room for `room` keys
  uint32_t room;
  uint32_t *listed;  // how many would be in the list if there were room
};

// Count the chunk's keys into shared.counts. Returns how many this thread found below the interval.
template <class K, class Bits>
__device__ __forceinline__ uint32_t count_chunk(const Chunk<Bits> &chunk, Shared &shared) {
  const bool lists = K::kBits > 16;
  if (shared.work.all) return visit_scores<K, true>(chunk.scores, chunk.items, shared, nullptr, 0);
  const uint32_t listed = lists && shared.work.from_list ? *chunk.listed : chunk.room + 1;
  if (listed > chunk.room) {
    uint32_t *const list = lists && shared.work.list ? chunk.list : nullptr;
    return visit_scores<K, false>(chunk.scores, chunk.items, shared, list, chunk.room);
  }
  const Interval in = shared.work.interval;
  for (uint32_t i = threadIdx.x; i < listed; i += kThreads) {
    const uint32_t keys[1] = {chunk.list[i]};
    visit<false>(keys, true, in, shared, nullptr, 0);
  }
  return 0;
}

// Add the block's counts to the tensor's. True in the last block to do so, for which all counts are complete.
__device__ bool publish(Record &record, Count *counts, uint32_t *listed, int blocks, Shared &shared) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (shared.counts[i] != 0) atomicAdd(counts + i, static_cast<Count>(shared.counts[i]));
  }
  if (threadIdx.x == 0) {
    if (shared.work.list) *listed = shared.listed;
    if (shared.work.window) atomicAdd(reinterpret_cast<Count *>(&record.below), static_cast<Count>(shared.below));
  }
  __threadfence();
  __syncthreads();
  const uint32_t last = static_cast<uint32_t>(blocks) - 1;
  if (threadIdx.x == 0) shared.last = atomicInc(&record.arrived, last) == last;  // which makes it 0 again
  __syncthreads();
  if (shared.last) __threadfence();
  return shared.last;
}

// The tensor that a block works for: the last one whose first block is not after it.
__device__ __forceinline__ int tensor_of(const Group &group, int block) {
  int tensor = 0;
  for (int step = kGroup / 2; step > 0; step /= 2) {
    if (tensor + step < group.count && group.first_block[tensor + step] <= block) tensor += step;
  }
  return tensor;
}

template <class F, bool kMagnitude>
__global__ void __launch_bounds__(kThreads, 2) select_kernel(const __grid_constant__ Group group, Launch launch) {
  using K = Key<F, kMagnitude>;
  using Bits = typename F::Bits;
  __shared__ Shared shared;
  const int block = blockIdx.x, tensor = tensor_of(group, block), first_block = group.first_block[tensor];
  const int blocks = group.first_block[tensor + 1] - first_block;
  const int64_t begin = static_cast<int64_t>(block - first_block) * group.chunk, left = group.size[tensor] - begin;
  const uint32_t room = group.chunk / kListShare;
  const Chunk<Bits> chunk = {static_cast<const Bits *>(group.scores[tensor]) + begin,
                             left < group.chunk ? static_cast<int>(left) : group.chunk,
                             group.lists + static_cast<int64_t>(block) * room, room, group.listed + block};
  Record &record = group.records[tensor];
  Count *const counts = group.counts + static_cast<int64_t>(tensor) * kBins;

  // Once, except that a tensor of one block need not wait for the next launch. Bounded, whatever the state held.
  for (int round = 0; round <= K::kDigits; ++round, launch = kNext) {
    if (threadIdx.x == 0) {
      shared.work = plan<K>(launch, record, block == first_block);
      shared.below = shared.listed = 0;
    }
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.counts[i] = 0;
    __syncthreads();
    if (shared.work.none && (blocks > 1 || launch == kNext)) return;
    if (!shared.work.none) {
      uint32_t below = count_chunk<K>(chunk, shared);
      if (shared.work.window) {
        below = __reduce_add_sync(kWarp, below);
        if (lane() == 0) atomicAdd(&shared.below, below);
      }
      __syncthreads();
      if (!publish(record, counts, chunk.listed, blocks, shared)) return;
      choose<K>(record, counts, group.rank[tensor], static_cast<Bits *>(group.tau) + tensor, shared);
      if (blocks > 1) return;
    }
    __syncthreads();
  }
}

}  // namespace
