// What CUDA's own headers take from others that torch's packages do not bring: qualifiers, and two types of numbers.
#pragma once
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDA_CB
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __location__(a)
struct __half { unsigned short bits; };
struct __half2 { __half low, high; };
struct __nv_bfloat16 { unsigned short bits; };
