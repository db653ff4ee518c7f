/* One pass of Pillow's bicubic resize over many RGB images, with the coefficients and the arithmetic of clip_resample.c:
   32-bit sums, rounded to 8 bits. clip_batch.py fills the tables, clip_gpu.py compiles this with NVRTC and runs it; tests
   compile it for the CPU. It needs no header. */

struct pass {
    const unsigned char *source;
    unsigned char *target;
    /* Strides in bytes, along the resized axis and beside it. */
    long long source_along, source_beside, target_along, target_beside;
    /* Window i reads taps[axis + i] pixels from first[axis + i] on, with the coefficients from whole + i * stride on. */
    int axis, whole, stride, count, beside, is_along_fastest;
};

#define BITS 22

/* One thread computes one pixel; blockIdx.y is the image. */
#ifdef __cplusplus
extern "C"
#endif
__global__ void resample(const struct pass *passes, const int *first, const int *taps, const int *whole) {
    const struct pass pass = passes[blockIdx.y];
    const int number = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (number >= pass.count * pass.beside) {
        return;
    }
    const int along = pass.is_along_fastest ? number % pass.count : number / pass.beside;
    const int beside = pass.is_along_fastest ? number / pass.count : number % pass.beside;
    const int *coefficients = whole + pass.whole + (long long)along * pass.stride;
    const unsigned char *pixel = pass.source + first[pass.axis + along] * pass.source_along + beside * pass.source_beside;
    int sum[3] = {1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1)};
    for (int tap = 0; tap < taps[pass.axis + along]; tap++, pixel += pass.source_along) {
        for (int band = 0; band < 3; band++) {
            sum[band] += coefficients[tap] * pixel[band];
        }
    }
    unsigned char *out = pass.target + along * pass.target_along + beside * pass.target_beside;
    for (int band = 0; band < 3; band++) {
        const int value = sum[band] >> BITS;
        out[band] = (unsigned char)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}
