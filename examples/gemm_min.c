/* The smallest use of Nibble: one AWQ weight, one product with int8 activations, checked. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "nibble.h"

enum { M = 4, N = 32, K = 256, GROUP = 128, GROUPS = K / GROUP };

static void check(nibble_status status) {
  if (status.code == NIBBLE_OK) return;
  fprintf(stderr, "error %d: %s\n", (int)status.code, status.message);
  exit(1);
}

int main(void) {
  /* A weight as AutoAWQ stores it: eight 4-bit codes per word, scales in f16 (0x2400 is 2^-6). */
  static uint32_t qweight[K * N / 8], qzeros[GROUPS * N / 8];
  static uint16_t scales[GROUPS * N];
  static float x[M * K], y[M * N], dense[K * N];
  for (int i = 0; i < K * N / 8; ++i) qweight[i] = 2654435761u * (uint32_t)(i + 1);
  for (int i = 0; i < GROUPS * N / 8; ++i) qzeros[i] = 0x87878787u;
  for (int i = 0; i < GROUPS * N; ++i) scales[i] = 0x2400;
  for (int i = 0; i < M * K; ++i) x[i] = (float)(i * 37 % 101) / 50.0f - 1.0f;

  nibble_weight_desc desc = {.k = K, .n = N, .group_size = GROUP, .layout = NIBBLE_AWQ_GEMM,
                             .scale_dtype = NIBBLE_F16, .qweight = qweight, .qzeros = qzeros,
                             .scales = scales};
  nibble_weight* weight;
  check(nibble_weight_create(&weight, &desc, 0));

  nibble_problem problem = {.m = M, .n = N, .k = K, .group_size = GROUP, .mode = NIBBLE_W4A8,
                            .granularity = NIBBLE_TOKEN};
  nibble_plan plan;
  check(nibble_gemm_plan(&plan, &problem, NULL));

  size_t bytes = nibble_gemm_workspace_bytes(&plan);
  char* memory = malloc(bytes + 63); /* C99 has no aligned allocation: start at a multiple of 64 */
  if (memory == NULL) return 1;
  nibble_input input = {.x = x, .x_stride = K};
  nibble_target target = {.weight = weight, .y = y, .y_stride = N};
  check(nibble_gemm(&plan, &input, &target, 1, memory + (64 - (uintptr_t)memory % 64) % 64));

  /* The same y[0] from float activations. Rounding x to 127 steps moves it by half a step a k. */
  check(nibble_dequantize(&desc, dense));
  double exact = 0, largest = 0, sum = 0;
  for (int k = 0; k < K; ++k) {
    exact += (double)x[k] * dense[k * N];
    if (fabs(x[k]) > largest) largest = fabs(x[k]);
    sum += fabs(dense[k * N]);
  }
  printf("%s: y[0] = %g, off by %.2g of it\n", nibble_plan_kernel(&plan), y[0],
         fabs(y[0] - exact) / fabs(exact));
  free(memory);
  nibble_weight_destroy(weight);
  return fabs(y[0] - exact) <= 0.501 * largest / 127 * sum ? 0 : 1;
}
