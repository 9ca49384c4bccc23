/*
 * Random calls on random handles: live ones, destroyed ones, ones of another type, ones whose parents are gone, none.
 * One thread against a model of what each call has to give; then four threads at once, where nothing may crash and no
 * call may give anything but OK, BAD_HANDLE and PARENT_DESTROYED.
 */
#include <pthread.h>
#include <stdlib.h>

#include "problem.h"

enum { RUNTIME, STREAM, BUFFER, COMM, PLAN, TYPES };
enum { MOST = 6, DEAD = 64, THREADS = 4 };

/* What the model knows of an object. Parents are objects, too; a dead one keeps its slot until nobody looks at it. */
typedef struct object {
  void *handle;
  int type, alive, aborted;
  struct object *runtime, *comm;
  struct object *before; /* the one that was made before */
} object_t;

static uint64_t state = 1;

static uint32_t draw(uint64_t *from, uint32_t n) {
  *from = *from * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return (uint32_t)(*from >> 33) % n;
}

/* Everything ever made, the last first: the dead are looked at, too. */
static object_t *objects = NULL;
static object_t *live[TYPES][MOST];
static object_t *dead[DEAD];
static int dead_count = 0;
static unsigned char foreign[16];

static object_t *make(int type, object_t *runtime, object_t *comm) {
  object_t *object = calloc(1, sizeof(*object));
  if (object == NULL) {
    printf("no memory\n");
    exit(1);
  }
  object->type = type;
  object->alive = 1;
  object->runtime = runtime;
  object->comm = comm;
  object->before = objects;
  objects = object;
  return object;
}

/* A handle for a call that wants `type`, mostly a live one, and what it is. */
static void *pick(int type, object_t **object) {
  *object = NULL;
  switch (draw(&state, 12)) {
    case 0: return NULL;
    case 1: return foreign + draw(&state, sizeof(foreign));
    case 2:
      *object = dead_count > 0 ? dead[draw(&state, (uint32_t)dead_count)] : NULL;
      break;
    case 3: *object = live[draw(&state, TYPES)][draw(&state, MOST)]; break;
    default: *object = live[type][draw(&state, MOST)];
  }
  return *object == NULL ? NULL : (*object)->handle;
}

/* What a call on `object` has to give that also serves where its runtime is gone. */
static treeattn_status_t wanted_anyhow(int type, const object_t *object) {
  return object == NULL || !object->alive || object->type != type ? TREEATTN_ERROR_BAD_HANDLE : TREEATTN_OK;
}

/* What any other call on `object` has to give. */
static treeattn_status_t wanted(int type, const object_t *object) {
  if (wanted_anyhow(type, object) != TREEATTN_OK) {
    return TREEATTN_ERROR_BAD_HANDLE;
  }
  if ((object->runtime != NULL && !object->runtime->alive) || (object->comm != NULL && !object->comm->alive)) {
    return TREEATTN_ERROR_PARENT_DESTROYED;
  }
  return TREEATTN_OK;
}

static treeattn_attention_desc_t small(void) {
  treeattn_attention_desc_t desc = problem_desc();
  desc.q_heads = desc.kv_heads = 1;
  return desc;
}

static treeattn_decode_args_t step(void) {
  /* An output of its own for every step that may be under way. */
  enum { OUTPUTS = 1 << 14 };
  static float q[DIM], k[DIM], v[DIM], out[OUTPUTS][DIM];
  static const int32_t length = 1;
  static int next;
  treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
  args.batch = args.query_tokens = 1;
  args.q = tensor(q, sizeof(q));
  args.k = tensor(k, sizeof(k));
  args.v = tensor(v, sizeof(v));
  args.out = tensor(out[next++ % OUTPUTS], sizeof(out[0]));
  args.kv_length = &length;
  return args;
}

static treeattn_status_t create_comm(void *runtime, treeattn_comm_t **comm) {
  const treeattn_device_t cpu = TREEATTN_CPU(0);
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  config.threads_per_rank = 1;
  return treeattn_comm_create_local(runtime, 1, &cpu, &config, comm);
}

/* Creates an object from a random parent, into a free slot. */
static void create(int type) {
  object_t **slot = &live[type][draw(&state, MOST)], *parent;
  void *handle = pick(type == PLAN ? COMM : RUNTIME, &parent), *made = NULL;
  treeattn_status_t found, want = wanted(type == PLAN ? COMM : RUNTIME, parent);
  treeattn_attention_desc_t desc = small();
  if (*slot != NULL) {
    return;
  }
  switch (type) {
    case RUNTIME:
      want = TREEATTN_OK;
      parent = NULL;
      found = treeattn_runtime_create(NULL, (treeattn_runtime_t **)&made);
      break;
    case STREAM: found = treeattn_stream_create(handle, TREEATTN_CPU(0), (treeattn_stream_t **)&made); break;
    case BUFFER: found = treeattn_buffer_alloc(handle, TREEATTN_CPU(0), 64, (treeattn_buffer_t **)&made); break;
    case COMM: found = create_comm(handle, (treeattn_comm_t **)&made); break;
    default:
      if (want == TREEATTN_OK && parent->aborted) {
        want = TREEATTN_ERROR_ABORTED;
      }
      found = draw(&state, 2) == 0
                  ? treeattn_plan_create(handle, &desc, (treeattn_plan_t **)&made)
                  : treeattn_plan_create_all(1, (treeattn_comm_t **)&handle, &desc, (treeattn_plan_t **)&made);
  }
  CHECK(found == want && (made != NULL) == (found == TREEATTN_OK));
  if (made != NULL) {
    *slot = type == PLAN ? make(type, parent->runtime, parent) : make(type, parent, NULL);
    (*slot)->handle = made;
  }
}

static treeattn_status_t destroy_as(int type, void *handle) {
  switch (type) {
    case RUNTIME: return treeattn_runtime_destroy(handle);
    case STREAM: return treeattn_stream_destroy(handle);
    case BUFFER: return treeattn_buffer_destroy(handle);
    case COMM: return treeattn_comm_destroy(handle);
    default: return treeattn_plan_destroy(handle);
  }
}

static void destroy(int type) {
  object_t *object;
  void *handle = pick(type, &object);
  int is_live = object != NULL && object->alive && object->type == type;
  treeattn_status_t want = handle == NULL || is_live ? TREEATTN_OK : TREEATTN_ERROR_BAD_HANDLE;
  CHECK(destroy_as(type, handle) == want);
  if (is_live) {
    object->alive = 0;
    for (int i = 0; i < MOST; i++) {
      if (live[type][i] == object) {
        live[type][i] = NULL;
      }
    }
    dead[dead_count < DEAD ? dead_count++ : (int)draw(&state, DEAD)] = object;
  }
}

/* A call that looks at an object, or uses it. */
static treeattn_status_t use(int type, uint32_t which, void *handle) {
  int32_t number;
  size_t needed;
  void *data;
  unsigned char bytes[64] = {0};
  switch (type) {
    case RUNTIME: {
      treeattn_device_info_t info = TREEATTN_DEVICE_INFO_INIT;
      treeattn_attention_desc_t desc = small();
      switch (which % 4) {
        case 0: return treeattn_runtime_device_count(handle, TREEATTN_DEVICE_CPU, &number);
        case 1: return treeattn_runtime_device_info(handle, TREEATTN_CPU(0), &info);
        case 2: return treeattn_runtime_set_log_callback(handle, NULL, NULL);
        default: return treeattn_attention_supported(handle, TREEATTN_CPU(0), &desc);
      }
    }
    case STREAM: return treeattn_stream_synchronize(handle);
    case BUFFER:
      switch (which % 3) {
        case 0: return treeattn_buffer_data(handle, &data);
        case 1: return treeattn_buffer_upload(handle, 0, bytes, sizeof(bytes));
        default: return treeattn_buffer_download(handle, 0, bytes, sizeof(bytes));
      }
    case COMM: {
      treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
      switch (which % 4) {
        case 0: return treeattn_comm_rank(handle, &number);
        case 1: return treeattn_comm_world(handle, &number);
        case 2: return treeattn_comm_describe(handle, NULL, 0, &needed);
        default: return treeattn_comm_status(handle, &status);
      }
    }
    default: {
      treeattn_plan_memory_t memory = TREEATTN_PLAN_MEMORY_INIT;
      treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
      return which % 2 == 0 ? treeattn_plan_memory(handle, &memory) : treeattn_plan_stats(handle, &stats);
    }
  }
}

static void decode(void) {
  object_t *plan, *stream;
  void *handle = pick(PLAN, &plan), *on = draw(&state, 2) == 0 ? NULL : pick(STREAM, &stream);
  treeattn_status_t want = wanted(PLAN, plan);
  treeattn_decode_args_t args = step();
  if (on != NULL && want == TREEATTN_OK) {
    want = wanted(STREAM, stream);
  } else if (on != NULL && want == TREEATTN_ERROR_PARENT_DESTROYED &&
             wanted(STREAM, stream) == TREEATTN_ERROR_BAD_HANDLE) {
    want = TREEATTN_ERROR_BAD_HANDLE;
  }
  if (want == TREEATTN_OK && plan->comm->aborted) {
    want = TREEATTN_ERROR_ABORTED;
  }
  treeattn_status_t found = treeattn_plan_decode(handle, &args, on);
  /* Where two things are wrong at once, either may be told. */
  CHECK(found == want || (found != TREEATTN_OK && want != TREEATTN_OK));
}

static void against_the_model(int calls) {
  for (int call = 0; call < calls && check_failures < 10; call++) {
    int type = (int)draw(&state, TYPES);
    object_t *object;
    switch (draw(&state, 8)) {
      case 0: create(type); break;
      case 1: destroy(type); break;
      case 2: decode(); break;
      case 3:
        if (draw(&state, 8) == 0) {
          void *handle = pick(COMM, &object);
          treeattn_status_t want = wanted_anyhow(COMM, object);
          CHECK(treeattn_comm_abort(handle) == want);
          if (want == TREEATTN_OK) {
            object->aborted = 1;
          }
        }
        break;
      default: {
        void *handle = pick(type, &object);
        uint32_t which = draw(&state, 4);
        int anyhow = type == STREAM || (type == COMM && which == 3);
        treeattn_status_t want = anyhow ? wanted_anyhow(type, object) : wanted(type, object);
        treeattn_status_t found = use(type, which, handle);
        /* A stream may tell of a step that its communicator's end broke. */
        int told = type == STREAM && want == TREEATTN_OK &&
                   (found == TREEATTN_ERROR_PARENT_DESTROYED || found == TREEATTN_ERROR_ABORTED);
        CHECK(found == want || told);
      }
    }
  }
  for (int type = 0; type < TYPES; type++) {
    for (int i = 0; i < MOST; i++) {
      if (live[type][i] != NULL) {
        CHECK_OK(destroy_as(type, live[type][i]->handle));
      }
    }
  }
}

/* Handles that all threads use and replace under each other's hands. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *shared[TYPES][MOST];

static void *exchange(int type, uint32_t at, void *handle, int put) {
  pthread_mutex_lock(&lock);
  void *former = shared[type][at];
  if (put) {
    shared[type][at] = handle;
  }
  pthread_mutex_unlock(&lock);
  return former;
}

typedef struct {
  uint64_t state;
  int calls, bad;
} racer_t;

static void *race(void *at) {
  racer_t *racer = at;
  treeattn_attention_desc_t desc = small();
  for (int call = 0; call < racer->calls; call++) {
    int type = (int)draw(&racer->state, TYPES);
    uint32_t slot = draw(&racer->state, MOST);
    treeattn_status_t found;
    if (draw(&racer->state, 16) == 0) {
      void *made = NULL, *parent = exchange(type == PLAN ? COMM : RUNTIME, draw(&racer->state, MOST), NULL, 0);
      switch (type) {
        case RUNTIME: found = treeattn_runtime_create(NULL, (treeattn_runtime_t **)&made); break;
        case STREAM: found = treeattn_stream_create(parent, TREEATTN_CPU(0), (treeattn_stream_t **)&made); break;
        case BUFFER: found = treeattn_buffer_alloc(parent, TREEATTN_CPU(0), 64, (treeattn_buffer_t **)&made); break;
        case COMM: found = create_comm(parent, (treeattn_comm_t **)&made); break;
        default: found = treeattn_plan_create(parent, &desc, (treeattn_plan_t **)&made);
      }
      if (found == TREEATTN_OK) {
        /* The former one goes, whoever is using it; another thread may have destroyed it. */
        found = destroy_as(type, exchange(type, slot, made, 1));
      }
    } else if (draw(&racer->state, 64) == 0) {
      found = destroy_as(type, exchange(type, slot, NULL, 0));
    } else {
      found = use(type, draw(&racer->state, 4), exchange(type, slot, NULL, 0));
    }
    if (found != TREEATTN_OK && found != TREEATTN_ERROR_BAD_HANDLE && found != TREEATTN_ERROR_PARENT_DESTROYED) {
      printf("a call gave %s: %s\n", treeattn_status_string(found), treeattn_last_error_message());
      racer->bad++;
    }
  }
  return NULL;
}

static void at_once(int calls) {
  pthread_t threads[THREADS];
  racer_t racers[THREADS];
  for (int i = 0; i < THREADS; i++) {
    racers[i].state = (uint64_t)i + 100;
    racers[i].calls = calls;
    racers[i].bad = 0;
    CHECK(pthread_create(&threads[i], NULL, race, &racers[i]) == 0);
  }
  for (int i = 0; i < THREADS; i++) {
    CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(racers[i].bad == 0);
  }
  for (int type = TYPES - 1; type >= 0; type--) {
    for (int i = 0; i < MOST; i++) {
      treeattn_status_t found = destroy_as(type, shared[type][i]);
      CHECK(found == TREEATTN_OK || found == TREEATTN_ERROR_BAD_HANDLE);
    }
  }
}

int main(void) {
  const char *test = getenv("TREEATTN_TEST");
  int full = test != NULL && strcmp(test, "full") == 0;
  against_the_model(full ? 1000000 : 100000);
  at_once(full ? 250000 : 10000);
  while (objects != NULL) {
    object_t *before = objects->before;
    free(objects);
    objects = before;
  }
  return check_report("handles");
}
