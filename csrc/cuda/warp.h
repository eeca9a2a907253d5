// The 32 lanes of a warp, on a GPU or on the host. A kernel written over them is compiled for both, so that tests on a CPU run
// the very templates that the GPU runs.
//
// A warp offers Each<T>, a T for each lane; lanes(f), which calls f(lane) for every lane; and exchanges between lanes.
#pragma once

#ifdef __CUDACC__
#define GRIT_DEVICE __device__ __forceinline__
#else
#define GRIT_DEVICE inline
#endif

namespace grit {

constexpr int LANES = 32;

#ifdef __CUDACC__

struct GpuWarp {
  template <class T>
  struct Each {
    T own;
    GRIT_DEVICE T& operator[](int) { return own; }
  };

  template <class F>
  GRIT_DEVICE static void lanes(F&& f) {
    f((int)threadIdx.x % LANES);
  }

  // Every number of x[lane] becomes its sum over the WIDTH neighbours that share lane / WIDTH.
  template <int WIDTH, int M, int N>
  GRIT_DEVICE static void sum(Each<float[M][N]>& x) {
#pragma unroll
    for (int offset = 1; offset < WIDTH; offset *= 2)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) x.own[m][n] += __shfl_xor_sync(0xffffffffu, x.own[m][n], offset);
  }
};

#else

struct HostWarp {
  template <class T>
  struct Each {
    T all[LANES];
    T& operator[](int lane) { return all[lane]; }
  };

  template <class F>
  static void lanes(F&& f) {
    for (int lane = 0; lane < LANES; ++lane) f(lane);
  }

  // in the order of the GPU's
  template <int WIDTH, int M, int N>
  static void sum(Each<float[M][N]>& x) {
    for (int offset = 1; offset < WIDTH; offset *= 2)
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
          float before[LANES];
          for (int lane = 0; lane < LANES; ++lane) before[lane] = x.all[lane][m][n];
          for (int lane = 0; lane < LANES; ++lane) x.all[lane][m][n] = before[lane] + before[lane ^ offset];
        }
  }
};

#endif

}  // namespace grit
