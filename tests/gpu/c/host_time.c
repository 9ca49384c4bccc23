/* Says what an eager call of treeattn_plan_decode costs the host, in C; nothing is asserted of it. */
#include <time.h>

#include "gpu.h"

enum { CALLS = 100, BATCHES = 200 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

static int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void time_calls(const char *what, treeattn_stream_t *on) {
  static double each[BATCHES];
  for (int i = 0; i < BATCHES; i++) {
    double began = now();
    for (int call = 0; call < CALLS; call++) {
      CHECK_OK(treeattn_plan_decode(plan, &step, on));
    }
    each[i] = (now() - began) / CALLS;
    CHECK_OK(treeattn_stream_synchronize(on));
  }
  qsort(each, BATCHES, sizeof(each[0]), by_size);
  printf("eager call of treeattn_plan_decode, %s: host time %.2f us median, %.2f best, %.2f p90\n", what,
         each[BATCHES / 2], each[0], each[BATCHES * 9 / 10]);
}

int main(void) {
  treeattn_stream_t *wrapped = NULL;
  gpu_find("host_time");
  gpu_make();
  CHECK(step_is_right());
  time_calls("no context current", stream);
  /* As in an engine: its context is current on the thread, the stream is its own. */
  driver_enter();
  CHECK_OK(treeattn_stream_wrap_cuda(runtime, TREEATTN_CUDA(0), driver_stream(), &wrapped));
  time_calls("the engine's stream", wrapped);
  return check_report("host_time");
}
