/*
 * 05_cpp: the C++17 header.
 *
 * Purpose       The same library with objects that own what they hold: moved, never copied, destroyed in any order.
 * How it works  Three ranks on streams, driven by one thread; eight query heads over two kv heads, f32. The output is
 *               scattered: each rank gets its own heads, as a tensor-parallel output projection wants them. Every
 *               operation has two forms. The plain one throws treeattn::Error; the one whose name begins with try_
 *               throws nothing and returns a Status or a Result, which the compiler insists be looked at.
 * When to use   In C++ engines. The header is a thin layer over treeattn.h; both can be mixed.
 */
#include <treeattn.hpp>

#include <cstdio>
#include <vector>

#include "../common/numeric.h"

namespace {

constexpr std::int32_t kRanks = 3, kHeads = 8, kKvHeads = 2, kDim = 48, kKeys = 500, kTokens = 2;
constexpr std::int32_t kQueryRow = kHeads * kDim, kKeyRow = kKvHeads * kDim;

std::vector<float> random_floats(std::size_t count, std::uint64_t seed) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(2.0 * random_unit(&seed));
  return values;
}

// The float64 answer for one row, over keys 0 to `visible` - 1.
row_t reference(const float* q, const float* k, const float* v, int visible) {
  row_t row;
  double query[kDim], key[kDim], value[kDim];
  row_begin(&row);
  for (int i = 0; i < kDim; i++) query[i] = q[i];
  for (int at = 0; at < visible; at++) {
    for (int i = 0; i < kDim; i++) {
      key[i] = k[at * kKeyRow + i];
      value[i] = v[at * kKeyRow + i];
    }
    row_add(&row, query, key, value, kDim, 1.0 / std::sqrt(kDim));
  }
  row_end(&row, kDim);
  return row;
}

int run() {
  const treeattn::Runtime runtime = treeattn::Runtime::create();
  const treeattn_device_info_t cpu = runtime.device_info(TREEATTN_CPU(0));
  std::printf("treeattn %s on %d cores\n\n", treeattn_version(), cpu.units);

  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  desc.q_heads = kHeads;
  desc.kv_heads = kKvHeads;
  desc.head_dim_qk = desc.head_dim_v = kDim;
  desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.max_batch = 1;
  desc.max_query_tokens = kTokens;
  desc.max_kv_length = kKeys;
  desc.causal = 1;
  desc.output = TREEATTN_OUTPUT_SCATTERED;

  const auto comms = treeattn::Communicator::create_local(runtime, {TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0)});
  const auto plans = treeattn::Plan::create_all(comms, desc);
  std::vector<treeattn::Stream> streams;
  for (const auto& comm : comms) {
    streams.push_back(treeattn::Stream::create(runtime, TREEATTN_CPU(0)));
    std::printf("rank %d of %d: plan of %llu KiB\n", comm.rank(), comm.world(),
                static_cast<unsigned long long>(plans[static_cast<std::size_t>(comm.rank())].memory().workspace >> 10));
  }

  // Contiguous placement: a run of tokens a rank. The queries are the last two of the 500 tokens.
  const auto q = random_floats(kTokens * kQueryRow, 1);
  const auto k = random_floats(kKeys * kKeyRow, 2), v = random_floats(kKeys * kKeyRow, 3);
  const std::int32_t global_length = kKeys;
  std::vector<std::int32_t> start(kRanks), length(kRanks);
  std::vector<std::vector<float>> out(kRanks), lse(kRanks);
  for (std::int32_t rank = 0; rank < kRanks; rank++) {
    const auto r = static_cast<std::size_t>(rank);
    start[r] = treeattn::global_position(desc.placement, kRanks, rank, kKeys, 0);
    length[r] = treeattn::local_length(desc.placement, kRanks, rank, kKeys);
    const auto [head, end] = treeattn::head_range(kHeads, kRanks, rank);
    out[r].resize(static_cast<std::size_t>(kTokens * (end - head) * kDim));
    lse[r].resize(static_cast<std::size_t>(kTokens * (end - head)));

    treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
    args.batch = 1;
    args.query_tokens = kTokens;
    args.kv_start = &start[r];
    args.kv_length = &length[r];
    args.global_length = &global_length;
    const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(length[r] * kKeyRow);
    args.q = treeattn::tensor(q);
    args.k = treeattn::tensor(k.data() + start[r] * kKeyRow, bytes);
    args.v = treeattn::tensor(v.data() + start[r] * kKeyRow, bytes);
    args.out = treeattn::tensor(out[r]);
    args.lse = treeattn::tensor(lse[r]);
    plans[r].decode(args, streams[r]);
  }
  for (const auto& stream : streams) stream.synchronize();

  worst_t all{};
  std::printf("\nrank   keys        heads  max |out error| (of bound)\n----   ---------   -----  --------------------------\n");
  for (std::int32_t rank = 0; rank < kRanks; rank++) {
    const auto r = static_cast<std::size_t>(rank);
    const auto [head, end] = treeattn::head_range(kHeads, kRanks, rank);
    worst_t worst{};
    for (int token = 0; token < kTokens; token++) {
      for (int h = head; h < end; h++) {
        const int kv = h / (kHeads / kKvHeads) * kDim, at = token * (end - head) + h - head;
        const row_t row = reference(q.data() + token * kQueryRow + h * kDim, k.data() + kv, v.data() + kv,
                                    kKeys - kTokens + token + 1);
        worst_row(&worst, &row, out[r].data() + at * kDim, lse[r][static_cast<std::size_t>(at)], kDim);
      }
    }
    std::printf("%4d   %3d - %3d   %d - %d  %15.1e (%3.0f %%)\n", rank, start[r], start[r] + length[r] - 1, head, end - 1,
                worst.out, 100.0 * worst.out_share);
    all.out_share = std::fmax(all.out_share, worst.out_share);
    all.lse_share = std::fmax(all.lse_share, worst.lse_share);
  }

  // Without exceptions: ask for something that this build does not serve, and look at the answer.
  desc.window = 128;
  const treeattn::Status status = runtime.try_supported(TREEATTN_CPU(0), desc);
  std::printf("\nwith a window: %s\n    %s\n\n", treeattn_status_string(status.code()), status.message().c_str());
  return worst_verdict(&all);
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const treeattn::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
