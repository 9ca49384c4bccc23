// The C++ layer: owners move and destroy once, both forms report, ranks on streams decode.
#include "treeattn.hpp"
#include "treeattn.hpp"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>

static int failures = 0;
#define CHECK(x) \
  ((x) ? static_cast<void>(0) : static_cast<void>((++failures, std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x))))

static_assert(!std::is_copy_constructible_v<treeattn::Plan> && !std::is_copy_assignable_v<treeattn::Plan>);
static_assert(std::is_nothrow_move_constructible_v<treeattn::Plan> && std::is_nothrow_move_assignable_v<treeattn::Plan>);

int main() {
  treeattn::Runtime runtime = treeattn::Runtime::create();
  CHECK(runtime.device_count(TREEATTN_DEVICE_CPU) == 1);
  CHECK(runtime.device_info(TREEATTN_CPU(0)).units >= 1);

  // Ranks 0 and 1 hold two keys each, all scores equal: the output is the mean of all values.
  std::vector<treeattn::Communicator> comms = treeattn::Communicator::create_local(runtime, {TREEATTN_CPU(0), TREEATTN_CPU(0)});
  CHECK(comms.size() == 2 && comms[1].rank() == 1 && comms[1].world() == 2);
  CHECK(comms[0].describe().front() == '{' && comms[0].describe().back() == '}');

  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  desc.q_heads = desc.kv_heads = 1;
  desc.head_dim_qk = desc.head_dim_v = 4;
  desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.max_batch = desc.max_query_tokens = 1;
  desc.max_kv_length = 2;
  runtime.supported(TREEATTN_CPU(0), desc);
  std::vector<treeattn::Plan> plans = treeattn::Plan::create_all(comms, desc);
  std::vector<treeattn::Stream> streams;
  std::vector<std::vector<float>> out(2, std::vector<float>(4)), v(2, std::vector<float>(8));
  std::vector<float> q(4, 0.0f), k(8, 1.0f), lse(1);
  const std::int32_t length = 2;
  for (int r = 0; r < 2; ++r) {
    for (int i = 0; i < 8; ++i) {
      v[r][i] = static_cast<float>(8 * r + i);
    }
    streams.push_back(treeattn::Stream::create(runtime, TREEATTN_CPU(0)));
  }
  for (int r = 0; r < 2; ++r) {
    treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
    args.batch = args.query_tokens = 1;
    args.q = treeattn::tensor(q);
    args.k = treeattn::tensor(k);
    args.v = treeattn::tensor(v[r]);
    args.out = treeattn::tensor(out[r]);
    if (r == 0) {
      args.lse = treeattn::tensor(lse);
    }
    args.kv_length = &length;
    plans[r].decode(args, streams[r]);
  }
  for (treeattn::Stream& stream : streams) {
    stream.synchronize();
  }
  for (int d = 0; d < 4; ++d) {
    CHECK(out[0][d] == static_cast<float>(6 + d) && out[1][d] == out[0][d]);
  }
  CHECK(std::fabs(lse[0] - std::log(4.0f)) < 1e-6f);
  CHECK(plans[0].stats().steps == 1 && plans[0].memory().workspace > 0);
  CHECK(comms[0].status().code == TREEATTN_OK);

  // The energy of keys with equal scores at 0: log of their number, and the mean of the values.
  {
    std::vector<float> gradient(4), f(1);
    treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
    args.batch = args.query_tokens = 1;
    args.q = treeattn::tensor(q);
    args.k = treeattn::tensor(k);
    args.v = treeattn::tensor(v[1]);
    args.out = treeattn::tensor(gradient);
    args.lse = treeattn::tensor(f);
    args.kv_length = &length;
    runtime.energy(TREEATTN_CPU(0), desc, args);
    CHECK(gradient[0] == 10.0f && std::fabs(f[0] - std::log(2.0f)) < 1e-6f);
    const std::vector<float> zeta(3);
    CHECK(runtime.try_energy(TREEATTN_CPU(0), desc, args, treeattn::tensor(zeta)).code() ==
          TREEATTN_ERROR_INVALID_ARGUMENT);
  }

  // A rank of a group of one, over the engine's own allgather.
  treeattn_transport_t callbacks = TREEATTN_TRANSPORT_INIT;
  callbacks.allgather = [](void*, const void* send, void* recv, std::size_t bytes, std::int64_t, const std::int32_t*) {
    std::memcpy(recv, send, bytes);
    return std::int32_t{0};
  };
  const treeattn::Communicator own =
      treeattn::Communicator::create_from_transport(runtime, callbacks, 1, 0, TREEATTN_CPU(0));
  CHECK(own.rank() == 0 && own.world() == 1 && own.describe().find("transport") != std::string::npos);
  callbacks.allgather = nullptr;
  CHECK(treeattn::Communicator::try_create_from_transport(runtime, callbacks, 1, 0, TREEATTN_CPU(0)).status().code() ==
        TREEATTN_ERROR_INVALID_ARGUMENT);

  // NCCL connects GPUs only, and wants a communicator to wrap.
  const std::array<std::uint8_t, 128> id = {};
  CHECK(treeattn::Communicator::try_create_nccl(runtime, id, 1, 0, TREEATTN_CPU(0)).status().code() ==
        TREEATTN_ERROR_UNSUPPORTED);
  CHECK(treeattn::Communicator::try_wrap_nccl(runtime, nullptr, TREEATTN_CUDA(0)).status().code() ==
        TREEATTN_ERROR_INVALID_ARGUMENT);
  const auto fresh = treeattn::Communicator::try_nccl_unique_id(runtime);
  CHECK(fresh || fresh.status().message().find("NCCL") != std::string::npos);

  // Both forms say the same.
  desc.kv_heads = 3;
  std::vector<treeattn::Communicator> alone = treeattn::Communicator::create_local(runtime, {TREEATTN_CPU(0)});
  treeattn::Result<treeattn::Plan> refused = treeattn::Plan::try_create(alone[0], desc);
  CHECK(!refused && refused.status().code() == TREEATTN_ERROR_INVALID_ARGUMENT);
  treeattn::Status status = runtime.try_supported(TREEATTN_CPU(0), desc);
  CHECK(!status && status.code() == TREEATTN_ERROR_INVALID_ARGUMENT);
  CHECK(status.message().find("kv_heads: found 3") != std::string::npos);
  try {
    runtime.supported(TREEATTN_CPU(0), desc);
    CHECK(false);
  } catch (const treeattn::Error& error) {
    CHECK(error.code() == TREEATTN_ERROR_INVALID_ARGUMENT);
    CHECK(std::string(error.what()).find("INVALID_ARGUMENT") == 0);
  }

  // A moved-from owner owns nothing; a parent may go first.
  treeattn::Plan moved = std::move(plans[0]);
  CHECK(moved && !plans[0]);
  treeattn::Runtime gone = std::move(runtime);
  gone.reset();
  CHECK(moved.try_decode(TREEATTN_DECODE_ARGS_INIT).code() == TREEATTN_ERROR_PARENT_DESTROYED);
  CHECK(moved.try_decode_team(TREEATTN_DECODE_ARGS_INIT, TREEATTN_TEAM_INIT).code() == TREEATTN_ERROR_PARENT_DESTROYED);

  const auto [first, last] = treeattn::head_range(5, 2, 1);
  CHECK(first == 2 && last == 5);
  const treeattn_placement_t placement = {TREEATTN_PLACEMENT_INTERLEAVED, 2};
  CHECK(treeattn::owner(placement, 3, 10, 7) == 0 && treeattn::local_length(placement, 3, 0, 10) == 4);
  CHECK(treeattn::local_slot(placement, 3, 10, 7) == 3 && treeattn::global_position(placement, 3, 0, 10, 3) == 7);
  return failures == 0 ? 0 : 1;
}
