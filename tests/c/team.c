/*
 * Steps on a team of the engine's threads: treeattn_plan_decode_team, with the same bits as the library's own threads, on
 * several ranks, with every bad member, and with members that do not come.
 */
#include "ranks.h"

enum { MOST = 8, SHORT = 300 };

static treeattn_runtime_t *runtime;
static problem_t problem;

/* A barrier that spins, as those of engines do. */
typedef struct {
  int size;
  volatile int count, round; /* by the __sync built-ins only */
} spin_t;

static void spin_wait(void *ctx) {
  spin_t *spin = ctx;
  int round = __sync_fetch_and_add(&spin->round, 0);
  if (__sync_add_and_fetch(&spin->count, 1) == spin->size) {
    __sync_fetch_and_and(&spin->count, 0);
    __sync_fetch_and_add(&spin->round, 1);
    return;
  }
  for (int looks = 0; __sync_fetch_and_add(&spin->round, 0) == round; looks++) {
    if (looks % 64 == 63) {
      sleep_ms(0);
    }
  }
}

/* One that lets everybody through at once. */
static void no_wait(void *ctx) { (void)ctx; }

/* A member's thread: calls `steps` times. */
typedef struct {
  treeattn_plan_t *plan;
  const treeattn_decode_args_t *args;
  treeattn_team_t team;
  int steps, delay_ms;
  treeattn_status_t status;
  char message[1024];
  double took_ms;
  pthread_t thread;
} member_t;

static void *member_run(void *at) {
  member_t *m = at;
  if (m->delay_ms > 0) {
    sleep_ms(m->delay_ms);
  }
  const double began = now_ms();
  for (int step = 0; step < m->steps && (step == 0 || m->status == TREEATTN_OK); step++) {
    m->status = treeattn_plan_decode_team(m->plan, m->args, &m->team);
  }
  m->took_ms = now_ms() - began;
  snprintf(m->message, sizeof(m->message), "%s", m->status == TREEATTN_OK ? "" : treeattn_last_error_message());
  return NULL;
}

typedef struct {
  spin_t spin;
  member_t members[MOST];
} team_t;

/* Which barrier members use. */
typedef enum { NO_BARRIER, SPINNING, LEAKY } barrier_t;

/* A team of `size` on `plan`, not begun. Only member 0 passes arguments. */
static void team_make(team_t *team, int size, treeattn_plan_t *plan, const treeattn_decode_args_t *args,
                      barrier_t barrier) {
  memset(team, 0, sizeof(*team));
  team->spin.size = size;
  for (int i = 0; i < size; i++) {
    member_t *m = &team->members[i];
    m->plan = plan;
    m->args = i == 0 ? args : NULL;
    m->team = (treeattn_team_t)TREEATTN_TEAM_INIT;
    m->team.index = i;
    m->team.size = size;
    m->team.barrier = barrier == NO_BARRIER ? NULL : barrier == SPINNING ? spin_wait : no_wait;
    m->team.ctx = &team->spin;
    m->steps = 1;
  }
}

static void team_begin(team_t *team, int from, int to) {
  for (int i = from; i < to; i++) {
    CHECK(pthread_create(&team->members[i].thread, NULL, member_run, &team->members[i]) == 0);
  }
}

/* All of them end with this status and a message that holds `text`. */
#define TEAM_ENDS(team, from, to, status, text) team_end((team), (from), (to), (status), (text), __LINE__)
static void team_end(team_t *team, int from, int to, treeattn_status_t status, const char *text, int line) {
  for (int i = from; i < to; i++) {
    member_t *m = &team->members[i];
    CHECK(pthread_join(m->thread, NULL) == 0);
    if (m->status != status || strstr(m->message, text) == NULL) {
      check_failures++;
      printf("team.c:%d: member %d gave %s (%s), wanted %s (%s)\n", line, i, treeattn_status_string(m->status), m->message,
             treeattn_status_string(status), text);
    }
  }
}

static void make_on(int world, int threads, int max_team, int step_ms, const treeattn_attention_desc_t *desc,
                    treeattn_comm_t **comms, treeattn_plan_t **plans) {
  treeattn_device_t devices[RANKS] = {TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  config.threads_per_rank = threads;
  config.max_team = max_team;
  config.step_timeout_ns = (int64_t)step_ms * 1000000;
  CHECK_OK(treeattn_comm_create_local(runtime, world, devices, &config, comms));
  CHECK_OK(treeattn_plan_create_all(world, comms, desc, plans));
}

static void unmake(int world, treeattn_comm_t **comms, treeattn_plan_t **plans) {
  for (int rank = 0; rank < world; rank++) {
    CHECK_OK(treeattn_plan_destroy(plans[rank]));
    CHECK_OK(treeattn_comm_destroy(comms[rank]));
  }
}

static int same_bits(const shard_t *a, const shard_t *b) {
  return memcmp(a->outputs.out, b->outputs.out, sizeof(a->outputs.out)) == 0 &&
         memcmp(a->outputs.lse, b->outputs.lse, sizeof(a->outputs.lse)) == 0;
}

/* Teams of every size one after the other on one plan, by every barrier: the bits of as many own threads. */
static void same_as_own_threads(void) {
  static shard_t own, teams;
  static team_t team;
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_comm_t *comm = NULL, *owns = NULL;
  treeattn_plan_t *plan = NULL, *own_plan = NULL;
  shard_make(&own, &problem, 1, 0);
  shard_make(&teams, &problem, 1, 0);
  make_on(1, 1, MOST, HANG, &desc, &comm, &plan);
  for (int turn = 0; turn < 2 * MOST; turn++) {
    int size = turn % 2 == 0 ? turn / 2 + 1 : MOST - turn / 2;
    make_on(1, size, 0, HANG, &desc, &owns, &own_plan);
    shard_reset(&own);
    CHECK_OK(treeattn_plan_decode(own_plan, &own.args, NULL));
    CHECK(shard_matches(&own, &problem));
    unmake(1, &owns, &own_plan);
    for (barrier_t barrier = NO_BARRIER; barrier <= LEAKY; barrier++) {
      shard_reset(&teams);
      team_make(&team, size, plan, &teams.args, barrier);
      for (int i = 0; i < size; i++) {
        team.members[i].steps = 50;
      }
      team_begin(&team, 0, size);
      TEAM_ENDS(&team, 0, size, TREEATTN_OK, "");
      CHECK(same_bits(&own, &teams) && outputs_guarded(&teams.outputs));
    }
    /* Between teams the plan serves one thread, too. */
    shard_reset(&teams);
    CHECK_OK(treeattn_plan_decode(plan, &teams.args, NULL));
    CHECK(shard_matches(&teams, &problem));
  }
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  CHECK_OK(treeattn_plan_stats(plan, &stats));
  CHECK(stats.steps == 2 * MOST * (3 * 50 + 1));
  unmake(1, &comm, &plan);
}

/* Ranks with a team each, by every algorithm. */
static void ranks_with_teams(void) {
  enum { TEAM = 3 };
  static shard_t shards[RANKS];
  static team_t teams[RANKS];
  for (int algorithm = 0; algorithm < ALGORITHM_COUNT; algorithm++) {
    treeattn_comm_t *comms[RANKS];
    treeattn_plan_t *plans[RANKS];
    treeattn_attention_desc_t desc = problem_desc();
    desc.algorithm = ALGORITHMS[algorithm];
    make_on(RANKS, 1, TEAM, HANG, &desc, comms, plans);
    for (int rank = 0; rank < RANKS; rank++) {
      shard_make(&shards[rank], &problem, RANKS, rank);
      shard_reset(&shards[rank]);
      team_make(&teams[rank], TEAM, plans[rank], &shards[rank].args, rank % 2 == 0 ? SPINNING : NO_BARRIER);
      for (int i = 0; i < TEAM; i++) {
        teams[rank].members[i].steps = 5;
      }
      team_begin(&teams[rank], 0, TEAM);
    }
    for (int rank = 0; rank < RANKS; rank++) {
      TEAM_ENDS(&teams[rank], 0, TEAM, TREEATTN_OK, "");
      CHECK(shard_matches(&shards[rank], &problem) && same_bits(&shards[rank], &shards[0]));
    }
    unmake(RANKS, comms, plans);
  }
}

/* Bad arguments of a step are refused by all members alike, and the next step is good. */
static void bad_arguments(void) {
  static shard_t shard;
  static team_t team;
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_comm_t *comm = NULL;
  treeattn_plan_t *plan = NULL;
  shard_make(&shard, &problem, 1, 0);
  make_on(1, 3, 0, HANG, &desc, &comm, &plan);
  for (int turn = 0; turn < 4; turn++) {
    treeattn_decode_args_t args = shard.args;
    const char *text = "";
    treeattn_status_t status = TREEATTN_ERROR_INVALID_ARGUMENT;
    int32_t length[BATCH] = {-1, 3};
    shard_reset(&shard);
    switch (turn) {
      case 0: args.q.data = NULL; text = "q.data: found NULL"; break;
      case 1: args.struct_size = 3; text = "args.struct_size: found 3"; break;
      case 2: args.batch = BATCH + 1; text = "batch: found 3"; break;
      default:
        args.kv_length = length;
        args.global_length = NULL;
        status = TREEATTN_ERROR_INVALID_DATA;
        text = "kv_length";
        break;
    }
    team_make(&team, 3, plan, &args, SPINNING);
    team_begin(&team, 0, 3);
    TEAM_ENDS(&team, 0, 3, status, text);
    CHECK(status == TREEATTN_ERROR_INVALID_DATA || check_untouched(&shard.outputs, sizeof(shard.outputs)));
    team_make(&team, 3, plan, NULL, NO_BARRIER);
    team_begin(&team, 0, 3);
    TEAM_ENDS(&team, 0, 3, TREEATTN_ERROR_INVALID_ARGUMENT, "args: found NULL");
    shard_reset(&shard);
    team_make(&team, 3, plan, &shard.args, SPINNING);
    team_begin(&team, 0, 3);
    TEAM_ENDS(&team, 0, 3, TREEATTN_OK, "");
    CHECK(shard_matches(&shard, &problem));
  }
  unmake(1, &comm, &plan);
}

/* Members that are none, while nobody waits for them: refused, and nothing is changed. */
static void bad_members(void) {
  static shard_t shard;
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_comm_t *comm = NULL, *other = NULL;
  treeattn_plan_t *plan = NULL, *dead = NULL;
  shard_make(&shard, &problem, 1, 0);
  shard_reset(&shard);
  make_on(1, 3, 0, HANG, &desc, &comm, &plan);
  make_on(1, 1, 0, HANG, &desc, &other, &dead);
  unmake(1, &other, &dead);
  treeattn_team_t team = TREEATTN_TEAM_INIT;
#define REFUSED(text) CHECK_INVALID(treeattn_plan_decode_team(plan, &shard.args, &team), text)
  REFUSED("team.size: found 0, wanted 1 to 3, the most that this communicator was made for (max_team)");
  team.size = -1;
  REFUSED("team.size: found -1");
  team.size = 4;
  REFUSED("team.size: found 4, wanted 1 to 3");
  team.size = INT32_MIN;
  REFUSED("team.size: found -2147483648");
  team.size = 3;
  const int32_t indexes[] = {3, -1, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) {
    team.index = indexes[i];
    REFUSED("team.index: found");
  }
  team.index = 0;
  team.size = 1;
  const size_t sizes[] = {0, 8, 31, SIZE_MAX};
  for (int i = 0; i < 4; i++) {
    team.struct_size = sizes[i];
    REFUSED("team.struct_size: found");
  }
  team.struct_size = sizeof(team);
  CHECK_INVALID(treeattn_plan_decode_team(plan, &shard.args, NULL), "team: found NULL");
  CHECK_INVALID(
      treeattn_plan_decode_team(plan, &shard.args, (const treeattn_team_t *)(const void *)((const char *)&team + 1)),
      "team: found 0x");
  CHECK_BAD_HANDLES(treeattn_plan_t, 0, dead, comm, "plan: found", treeattn_plan_decode_team(handle, &shard.args, &team));
  CHECK(check_untouched(&shard.outputs, sizeof(shard.outputs)));
  CHECK_OK(treeattn_plan_decode_team(plan, &shard.args, &team));
  CHECK(shard_matches(&shard, &problem));
  CHECK_OK(treeattn_comm_destroy(comm));
  CHECK_PARENT_DESTROYED(treeattn_plan_decode_team(plan, &shard.args, &team), "communicator: found destroyed");
  CHECK_OK(treeattn_plan_destroy(plan));

  treeattn_device_t device = TREEATTN_CPU(0);
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  const int32_t most[] = {-1, 1025, INT32_MAX};
  for (int i = 0; i < 3; i++) {
    config.max_team = most[i];
    CHECK_INVALID(treeattn_comm_create_local(runtime, 1, &device, &config, &comm), "max_team: found");
  }
  config.max_team = 0;
  config.reserved = 1;
  CHECK_INVALID(treeattn_comm_create_local(runtime, 1, &device, &config, &comm), "reserved: found 1, wanted 0");
}

/* Members that cannot meet: all that have come end alike, and so do those that come later. The plan serves steps without a
 * team, and the communicator other plans. */
static void members_that_cannot_meet(void) {
  static shard_t shard;
  static team_t team;
  treeattn_attention_desc_t desc = problem_desc();
  shard_make(&shard, &problem, 1, 0);
  enum { MISSING, NO_LEADER, SIZES, INDEXES, BARRIERS, OUT_OF_RANGE, ABORTED, DESTROYED, OTHER_BARRIERS, CASES };
  for (int which = 0; which < CASES; which++) {
    treeattn_comm_t *comm = NULL;
    treeattn_plan_t *plan = NULL;
    treeattn_status_t status = TREEATTN_ERROR_INVALID_ARGUMENT;
    const char *text = "";
    int from = 0, to = 4, is_nan = 0;
    make_on(1, 4, 0, which == MISSING || which == NO_LEADER ? SHORT : HANG, &desc, &comm, &plan);
    shard_reset(&shard);
    team_make(&team, 4, plan, &shard.args, which % 2 == 0 ? SPINNING : NO_BARRIER);
    team.members[3].delay_ms = 100;
    switch (which) {
      case MISSING:
        to = 3;
        is_nan = 1;
        status = TREEATTN_ERROR_TIMEOUT;
        text = "team of rank 0: member 3 of 4 did not come within 300ms (step_timeout_ns)";
        break;
      case NO_LEADER:
        from = 1;
        status = TREEATTN_ERROR_TIMEOUT;
        text = "member 0 of 4 did not come within 300ms (step_timeout_ns)";
        break;
      case SIZES: /* index 2 of 3, where 2 of 4 has not come */
        team.members[3].team.index = 2;
        team.members[3].team.size = 3;
        team.members[2].delay_ms = 300;
        text = "team.size: found 3, wanted 4, as of the members that came before";
        break;
      case INDEXES:
        team.members[3].team.index = 1;
        text = "team.index: found 1 of two members at a time, wanted each of 0 to 3 once";
        break;
      case BARRIERS:
        team.members[3].team.barrier = NULL;
        text = "team.barrier: found NULL, wanted one, as of the members that came before";
        break;
      case OTHER_BARRIERS:
        team.members[3].team.barrier = no_wait;
        text = "team.barrier: found another function of member 3 than of member 0, wanted the same for all members";
        break;
      case OUT_OF_RANGE:
        team.members[3].team.index = 4;
        text = "team.index: found 4, wanted 0 to 3";
        break;
      case ABORTED:
        to = 3;
        is_nan = 1;
        status = TREEATTN_ERROR_ABORTED;
        break;
      default:
        to = 3;
        status = TREEATTN_ERROR_PARENT_DESTROYED;
        text = "communicator: found destroyed";
        break;
    }
    team_begin(&team, from, to);
    if (which == ABORTED || which == DESTROYED) {
      sleep_ms(50);
      CHECK_OK(which == ABORTED ? treeattn_comm_abort(comm) : treeattn_comm_destroy(comm));
    }
    TEAM_ENDS(&team, from, to, status, text);
    for (int i = from; i < to; i++) {
      CHECK(team.members[i].took_ms < SOON);
    }
    CHECK(is_nan ? shard_is_nan(&shard) : check_untouched(&shard.outputs, sizeof(shard.outputs)));
    if (which == DESTROYED) {
      CHECK_OK(treeattn_plan_destroy(plan));
      continue;
    }
    /* Nobody waits for anybody any more. */
    shard_reset(&shard);
    team_make(&team, 4, plan, &shard.args, SPINNING);
    for (int i = 4; i-- > 0;) {
      team_begin(&team, i, i + 1);
      TEAM_ENDS(&team, i, i + 1, status, text);
    }
    CHECK(status != TREEATTN_ERROR_INVALID_ARGUMENT ? shard_is_nan(&shard) : check_untouched(&shard.outputs, sizeof(shard.outputs)));
    if (which != ABORTED) {
      treeattn_plan_t *second = NULL;
      shard_reset(&shard);
      CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
      CHECK(shard_matches(&shard, &problem));
      CHECK_OK(treeattn_plan_create(comm, &desc, &second));
      shard_reset(&shard);
      team_make(&team, 4, second, &shard.args, SPINNING);
      team_begin(&team, 0, 4);
      TEAM_ENDS(&team, 0, 4, TREEATTN_OK, "");
      CHECK(shard_matches(&shard, &problem));
      CHECK_OK(treeattn_plan_destroy(second));
    }
    unmake(1, &comm, &plan);
  }
}

/* A team that cannot meet fails its peers, which would wait for its rank. */
static void a_team_fails_its_peers(void) {
  static shard_t shards[2];
  static team_t teams[2];
  treeattn_comm_t *comms[2];
  treeattn_plan_t *plans[2];
  treeattn_attention_desc_t desc = problem_desc();
  make_on(2, 1, 2, SHORT, &desc, comms, plans);
  for (int rank = 0; rank < 2; rank++) {
    shard_make(&shards[rank], &problem, 2, rank);
    shard_reset(&shards[rank]);
    team_make(&teams[rank], 2, plans[rank], &shards[rank].args, NO_BARRIER);
    teams[rank].members[0].delay_ms = rank == 0 ? 150 : 0;
    team_begin(&teams[rank], 0, rank == 0 ? 2 : 1);
  }
  TEAM_ENDS(&teams[1], 0, 1, TREEATTN_ERROR_TIMEOUT, "team of rank 1: member 1 of 2 did not come");
  TEAM_ENDS(&teams[0], 0, 2, TREEATTN_ERROR_TIMEOUT, "team of rank 1: member 1 of 2 did not come");
  for (int rank = 0; rank < 2; rank++) {
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    CHECK(shard_is_nan(&shards[rank]));
    CHECK_OK(treeattn_comm_status(comms[rank], &status));
    CHECK(status.code == TREEATTN_ERROR_TIMEOUT && status.broken == 1 && status.rank == 1);
  }
  unmake(2, comms, plans);
}

int main(void) {
  problem_make(&problem, GROUP_SEED);
  runtime = runtime_make();
  same_as_own_threads();
  ranks_with_teams();
  bad_arguments();
  bad_members();
  members_that_cannot_meet();
  a_team_fails_its_peers();
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("team");
}
