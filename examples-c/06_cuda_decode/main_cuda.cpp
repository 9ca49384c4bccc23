/*
 * 06_cuda_decode: decode attention on a GPU, beside code that uses the CUDA runtime API.
 *
 * Purpose       What an engine does: its own device pointers and its own stream go in, one kernel is enqueued, and a
 *               step captured into a CUDA graph is replayed for every token.
 * How it works  A cache of 4,096 f16 keys and values lies in memory from cudaMalloc (32 query heads over 8 kv heads of
 *               128). One step is captured: the library reads the length of the sequence on the device, so the same graph
 *               serves every length. Then the cache grows token by token: the new length and query are copied on the
 *               stream, the graph is replayed. Some of the outputs are compared with float64.
 * When to use   On any NVIDIA GPU of compute capability 8.0 or later. Compiled only where a CUDA toolkit is found.
 */
#include <treeattn.hpp>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../common/numeric.h"

namespace {

constexpr int kHeads = 32, kKvHeads = 8, kDim = 128, kCapacity = 4096;
constexpr int kQueryRow = kHeads * kDim, kKeyRow = kKvHeads * kDim;

void cuda_check(cudaError_t status, const char* call, int line) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s:%d: %s\n    returned %s\n", __FILE__, line, call, cudaGetErrorString(status));
  std::exit(1);
}
#define CUDA(call) cuda_check(call, #call, __LINE__)

// Random values that f16 holds exactly.
std::vector<std::uint16_t> random_halves(std::size_t count, std::uint64_t seed) {
  std::vector<std::uint16_t> values(count);
  for (auto& value : values) value = double_to_half(2.0 * random_unit(&seed));
  return values;
}

// A copy of host data on the device.
template <typename T>
T* to_device(const std::vector<T>& host) {
  void* device = nullptr;
  CUDA(cudaMalloc(&device, host.size() * sizeof(T)));
  CUDA(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(device);
}

// The float64 answer for one head over keys 0 to `keys` - 1.
row_t reference(const std::uint16_t* q, const std::uint16_t* k, const std::uint16_t* v, int keys) {
  double q64[kDim], k64[kDim], v64[kDim];
  row_t row;
  row_begin(&row);
  for (int d = 0; d < kDim; d++) q64[d] = half_to_double(q[d]);
  for (int key = 0; key < keys; key++) {
    for (int d = 0; d < kDim; d++) {
      k64[d] = half_to_double(k[static_cast<std::size_t>(key) * kKeyRow + static_cast<std::size_t>(d)]);
      v64[d] = half_to_double(v[static_cast<std::size_t>(key) * kKeyRow + static_cast<std::size_t>(d)]);
    }
    row_add(&row, q64, k64, v64, kDim, 1.0 / std::sqrt(kDim));
  }
  row_end(&row, kDim);
  return row;
}

treeattn_tensor_t tensor(const void* data, std::size_t bytes) {
  treeattn_tensor_t tensor{};  // all strides zero: packed
  tensor.data = const_cast<void*>(data);
  tensor.bytes = bytes;
  return tensor;
}

int run() {
  const auto runtime = treeattn::Runtime::create();
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("found no GPU: nothing to show\n");
    return 77;  // skipped
  }
  cudaDeviceProp properties;
  CUDA(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s\n\n", properties.name);

  // The engine's own things.
  const auto queries = random_halves(static_cast<std::size_t>(kCapacity) * kQueryRow, 1);
  const auto k = random_halves(static_cast<std::size_t>(kCapacity) * kKeyRow, 2);
  const auto v = random_halves(static_cast<std::size_t>(kCapacity) * kKeyRow, 3);
  std::vector<std::int32_t> lengths(kCapacity);
  for (int i = 0; i < kCapacity; i++) lengths[static_cast<std::size_t>(i)] = i + 1;
  const auto *d_queries = to_device(queries), *d_k = to_device(k), *d_v = to_device(v);
  const auto* d_lengths = to_device(lengths);
  auto* d_q = to_device(std::vector<std::uint16_t>(kQueryRow));
  auto* d_length = to_device(std::vector<std::int32_t>(1));
  auto* d_out = to_device(std::vector<float>(kQueryRow));
  auto* d_lse = to_device(std::vector<float>(kHeads));
  cudaStream_t stream;
  CUDA(cudaStreamCreate(&stream));

  // The library's: a plan allocates everything it will ever need.
  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  desc.q_heads = kHeads;
  desc.kv_heads = kKvHeads;
  desc.head_dim_qk = desc.head_dim_v = kDim;
  desc.q_dtype = desc.k_dtype = desc.v_dtype = TREEATTN_DTYPE_F16;
  desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.max_batch = desc.max_query_tokens = 1;
  desc.max_kv_length = kCapacity;
  const treeattn_status_t supported = runtime.try_supported(TREEATTN_CUDA(0), desc).code();
  if (supported != TREEATTN_OK) {
    std::printf("%s\n", treeattn_last_error_message());
    return 1;
  }
  const auto comms = treeattn::Communicator::create_local(runtime, {TREEATTN_CUDA(0)});
  const auto plan = treeattn::Plan::create(comms[0], desc);
  const auto wrapped = treeattn::Stream::wrap_cuda(runtime, TREEATTN_CUDA(0), stream);

  treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
  args.batch = args.query_tokens = 1;
  args.kv_length = d_length;  // read on the device: one graph for every length
  args.q = tensor(d_q, kQueryRow * sizeof *d_q);
  args.k = tensor(d_k, k.size() * sizeof *d_k);
  args.v = tensor(d_v, v.size() * sizeof *d_v);
  args.out = tensor(d_out, kQueryRow * sizeof *d_out);
  args.lse = tensor(d_lse, kHeads * sizeof *d_lse);

  cudaGraph_t graph;
  cudaGraphExec_t step;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  plan.decode(args, wrapped);
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&step, graph, 0));

  std::printf("keys   us a step   max |out error| (of bound)\n----   ---------   --------------------------\n");
  worst_t all{};
  std::vector<float> out(kQueryRow), lse(kHeads);
  cudaEvent_t begin, end;
  CUDA(cudaEventCreate(&begin));
  CUDA(cudaEventCreate(&end));
  CUDA(cudaEventRecord(begin, stream));
  int timed = 0;
  for (int keys = 1; keys <= kCapacity; keys++) {
    const std::size_t last = static_cast<std::size_t>(keys) - 1;
    CUDA(cudaMemcpyAsync(d_q, d_queries + last * kQueryRow, kQueryRow * sizeof *d_q, cudaMemcpyDeviceToDevice, stream));
    CUDA(cudaMemcpyAsync(d_length, d_lengths + last, sizeof *d_length, cudaMemcpyDeviceToDevice, stream));
    CUDA(cudaGraphLaunch(step, stream));
    timed++;
    if ((keys & (keys - 1)) != 0 || (keys != 1 && keys < 64)) continue;

    float ms = 0;
    CUDA(cudaEventRecord(end, stream));
    CUDA(cudaEventSynchronize(end));
    CUDA(cudaEventElapsedTime(&ms, begin, end));
    CUDA(cudaMemcpy(out.data(), d_out, kQueryRow * sizeof(float), cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(lse.data(), d_lse, kHeads * sizeof(float), cudaMemcpyDeviceToHost));
    worst_t worst{};
    for (int head = 0; head < kHeads; head += 5) {
      const int kv = head / (kHeads / kKvHeads) * kDim;
      const row_t row = reference(queries.data() + last * kQueryRow + head * kDim, k.data() + kv, v.data() + kv, keys);
      worst_row(&worst, &row, out.data() + head * kDim, lse[static_cast<std::size_t>(head)], kDim);
    }
    std::printf("%4d   %9.1f   %15.1e (%3.0f %%)\n", keys, 1000.0 * static_cast<double>(ms) / timed, worst.out,
                100.0 * worst.out_share);
    all.out_share = std::fmax(all.out_share, worst.out_share);
    all.lse_share = std::fmax(all.lse_share, worst.lse_share);
    CUDA(cudaEventRecord(begin, stream));
    timed = 0;
  }
  std::printf("\n");
  CUDA(cudaGraphExecDestroy(step));
  CUDA(cudaGraphDestroy(graph));
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
