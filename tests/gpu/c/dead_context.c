/*
 * A CUDA error that was there before our call is told as such; a context that died is CUDA_FATAL for every later call,
 * and destroying returns.
 */
#include <time.h>

#include "gpu.h"

/* Writes to an address that nobody has. */
static const char KERNEL[] =
    ".version 7.0\n.target sm_80\n.address_size 64\n"
    ".visible .entry stray() {\n .reg .b64 %rd1;\n .reg .b32 %r1;\n mov.u64 %rd1, 8;\n mov.u32 %r1, 1;\n"
    " st.global.u32 [%rd1], %r1;\n ret;\n}\n";

int main(void) {
  void *module = NULL, *function = NULL;
  treeattn_attention_desc_t desc = gpu_desc();
  treeattn_plan_t *more = NULL;
  treeattn_buffer_t *memory = NULL;
  char byte = 0;
  gpu_find("dead_context");
  gpu_make();
  CHECK(step_is_right());
  driver_enter();
  DRIVER_OK(DRIVER(driver_module_t, "cuModuleLoadData")(&module, KERNEL));
  DRIVER_OK(DRIVER(driver_function_t, "cuModuleGetFunction")(&function, module, "stray"));
  DRIVER_OK(DRIVER(driver_launch_t, "cuLaunchKernel")(function, 1, 1, 1, 1, 1, 1, 0, driver_stream(), NULL, NULL));

  /* It shows some time after the kernel ran. */
  treeattn_status_t found = TREEATTN_OK;
  time_t began = time(NULL);
  while (found == TREEATTN_OK && time(NULL) - began < 10) {
    found = treeattn_plan_decode(plan, &step, stream);
  }
  CHECK(found == TREEATTN_ERROR_CUDA_PRIOR);
  CHECK(strstr(treeattn_last_error_message(), "before this call") != NULL);
  printf("%s\n", treeattn_last_error_message());

  CHECK_STATUS(treeattn_plan_decode(plan, &step, stream), TREEATTN_ERROR_CUDA_FATAL, "cuda:0");
  CHECK_STATUS(treeattn_plan_partial(plan, &step, stream), TREEATTN_ERROR_CUDA_FATAL, "cuda:0");
  CHECK_STATUS(treeattn_stream_synchronize(stream), TREEATTN_ERROR_CUDA_FATAL, "cuda:0");
  CHECK_STATUS(treeattn_buffer_download(buffer, 0, &byte, 1), TREEATTN_ERROR_CUDA_FATAL, "cuda:0");
  CHECK_STATUS(treeattn_buffer_upload(buffer, 0, &byte, 1), TREEATTN_ERROR_CUDA_FATAL, "cuda:0");
  CHECK_STATUS(treeattn_plan_create(comm, &desc, &more), TREEATTN_ERROR_CUDA_FATAL, "cuda:0");
  CHECK_STATUS(treeattn_buffer_alloc(runtime, TREEATTN_CUDA(0), 8, &memory), TREEATTN_ERROR_CUDA_FATAL, "cuda:0");

  began = time(NULL);
  CHECK_OK(treeattn_plan_destroy(plan));
  CHECK_OK(treeattn_buffer_destroy(buffer));
  CHECK_OK(treeattn_stream_destroy(stream));
  CHECK_OK(treeattn_comm_destroy(comm));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  CHECK(time(NULL) - began < 30);
  return check_report("dead_context");
}
