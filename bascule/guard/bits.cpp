// The bits and the length of each of many fp32 tensors in one pass over memory (bits.py). Neither depends on the number of threads.
#include <cstdint>
#include <cstring>

typedef float lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef int64_t words __attribute__((vector_size(32)));
static const long WIDTH = 8, STRIP = 4096;  // squares are added in fp32 over a strip, strips in double

extern "C" void survey(const float *const *tensors, const int64_t *counts, long many, int64_t *bits, double *squares) {
#pragma omp parallel for schedule(dynamic)
  for (long t = 0; t < many; t++) {
    words sums = {};
    double total = 0;
    const float *x = tensors[t];
    long left = counts[t];
    while (left >= WIDTH) {
      const long n = left < STRIP ? left / WIDTH : STRIP / WIDTH;
      lanes even = {}, odd = {};
      for (long i = 0; i < n; i++) {
        const lanes v = *(const lanes *)(x + i * WIDTH);
        sums += (words)v;
        if (i % 2) odd += v * v; else even += v * v;
      }
      even += odd;
      for (long i = 0; i < WIDTH; i++) total += even[i];
      x += n * WIDTH;
      left -= n * WIDTH;
    }
    uint64_t sum = 0;
    for (long i = 0; i < 4; i++) sum += (uint64_t)sums[i];
    for (; left; left--, x++) {
      uint32_t last;
      memcpy(&last, x, 4);
      sum += last;
      total += (double)*x * *x;
    }
    bits[t] = (int64_t)sum;
    squares[t] = total;
  }
}
