/* The most that this machine can do: of each JPEG only the crop's blocks become pixels (libjpeg-turbo), and the crop is
   resized with a triangle filter, as Pillow's BILINEAR, straight into the batch. One call does a run of images; it
   takes no lock, so one thread per core can be in it. Decompressor and buffers of a thread live as long as the thread.

   cc -O3 -march=native -shared -fPIC limit.c -o limit.so -ljpeg -lm        (needs AVX2) */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>
#include <immintrin.h>

enum { SIDE = 1024, ROW = 16384, TAPS = 32 }; /* largest output side, pixels of a row, taps of a pixel */

struct failure { struct jpeg_error_mgr manager; jmp_buf jump; };
struct axis { int first[SIDE], count[SIDE], taps, groups; int16_t weight[SIDE * TAPS]; };

static __thread struct {
    struct jpeg_decompress_struct jpeg;
    struct failure failure;
    int is_made;
    uint8_t *pixels; /* the decoded window, 4 bytes a pixel */
    size_t room;
    __attribute__((aligned(32))) int16_t row[ROW * 4 + 64]; /* one output row before the horizontal pass: 7 fractional bits */
    struct axis x, y;
    __attribute__((aligned(32))) int16_t spread[SIDE * TAPS * 4]; /* weights of x in the order in which the horizontal pass multiplies */
} own;

static void on_error(j_common_ptr jpeg) { longjmp(((struct failure *)jpeg->err)->jump, 1); }
static void on_message(j_common_ptr jpeg) { (void)jpeg; }

/* Taps of a triangle filter from `in` to `out` pixels; weights sum to 1 << bits. */
static void triangle(struct axis *axis, int in, int out, int bits, int is_mirrored) {
    double scale = (double)in / out, support = scale > 1 ? scale : 1, weight[TAPS];
    axis->taps = 1;
    for (int o = 0; o < out; o++) {
        double centre = (o + 0.5) * scale, sum = 0;
        int from = (int)(centre - support + 0.5), to = (int)(centre + support + 0.5);
        if (from < 0) from = 0;
        if (to > in) to = in;
        if (to - from > TAPS) to = from + TAPS;
        for (int i = from; i < to; i++) {
            double w = 1 - fabs((i - centre + 0.5) / support);
            weight[i - from] = w > 0 ? w : 0;
            sum += weight[i - from];
        }
        int at = is_mirrored ? out - 1 - o : o, left = 1 << bits, largest = 0;
        int16_t *into = axis->weight + (size_t)at * TAPS;
        memset(into, 0, TAPS * sizeof *into);
        for (int i = 0; i < to - from; i++) {
            int w = (int)lrint(weight[i] / sum * (1 << bits));
            into[i] = w > 32767 ? 32767 : w;
            left -= w;
            if (into[i] > into[largest]) largest = i;
        }
        if (into[largest] + left <= 32767) into[largest] += left;
        axis->first[at] = from;
        axis->count[at] = to - from;
        if (to - from > axis->taps) axis->taps = to - from;
    }
    axis->groups = (axis->taps + 3) / 4;
}

#define INLINE static inline __attribute__((always_inline))

/* One output row before the horizontal pass; `taps` is a constant where it is called, so the weights stay in registers. */
INLINE void down_by(const uint8_t *top, size_t stride, int values, const int16_t *weight, int taps) {
    for (int i = 0; i < values; i += 16) {
        __m256i sum = _mm256_setzero_si256();
        for (int t = 0; t < taps; t++) {
            __m256i value = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(top + t * stride + i)));
            sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(_mm256_slli_epi16(value, 7), _mm256_set1_epi16(weight[t])));
        }
        _mm256_store_si256((__m256i *)(own.row + i), sum);
    }
}

static void down(const uint8_t *top, size_t stride, int values, const int16_t *weight, int taps) {
    switch (taps) {
    case 1: down_by(top, stride, values, weight, 1); break;
    case 2: down_by(top, stride, values, weight, 2); break;
    case 3: down_by(top, stride, values, weight, 3); break;
    case 4: down_by(top, stride, values, weight, 4); break;
    default: down_by(top, stride, values, weight, taps);
    }
}

/* Two output pixels, 4 sums of 32 bits each. */
INLINE __m256i two(const int16_t *row, const int *first, const int16_t *spread, int groups) {
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    __m256i a = _mm256_setzero_si256(), b = a;
    const int16_t *left = row + first[0] * 4, *right = row + first[1] * 4;
    for (int g = 0; g < groups; g++) {
        __m256i value = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(left + g * 16)), pairs);
        a = _mm256_add_epi32(a, _mm256_madd_epi16(value, _mm256_load_si256((const __m256i *)(spread + g * 16))));
        value = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(right + g * 16)), pairs);
        b = _mm256_add_epi32(b, _mm256_madd_epi16(value, _mm256_load_si256((const __m256i *)(spread + (groups + g) * 16))));
    }
    a = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    return _mm256_srai_epi32(_mm256_add_epi32(a, _mm256_set1_epi32(1 << 20)), 21);
}

/* Four pixels into a line, from sums of 32 bits. */
INLINE void put(uint8_t *line, int q, int side, __m256i a, __m256i b) {
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 8, 10, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           -1, -1, -1, -1, -1, -1, 0, 2, 4, 8, 10, 12, -1, -1, -1, -1);
    /* a: pixels 0 | 1, b: 2 | 3; the values are 0 to 255, so that their low bytes are the pixels */
    __m256i words = _mm256_packs_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    words = _mm256_shuffle_epi8(words, order);
    __m128i four = _mm_or_si128(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (q + 4 < side) _mm_storeu_si128((__m128i *)(line + q * 3), four);
    else memcpy(line + q * 3, &four, 12);
}

INLINE void across_by(uint8_t *line, int side, int groups) {
    for (int q = 0; q < side; q += 4) {
        __m256i a = two(own.row, own.x.first + q, own.spread + q * groups * 16, groups);
        __m256i b = two(own.row, own.x.first + q + 2, own.spread + (q + 2) * groups * 16, groups);
        put(line, q, side, a, b);
    }
}

/* The same where no pixel has more than two taps: one multiplication gives two pixels. */
static void across_pairs(uint8_t *line, int side) {
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m256i half = _mm256_set1_epi32(1 << 20);
    const int *first = own.x.first;
    for (int q = 0; q < side; q += 4) {
        __m256i sums[2];
        for (int p = 0; p < 2; p++) {
            __m256i value = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(own.row + first[q + 2 * p] * 4)));
            value = _mm256_inserti128_si256(value, _mm_loadu_si128((const __m128i *)(own.row + first[q + 2 * p + 1] * 4)), 1);
            value = _mm256_madd_epi16(_mm256_shuffle_epi8(value, pairs), _mm256_load_si256((const __m256i *)(own.spread + (q + 2 * p) * 8)));
            sums[p] = _mm256_srai_epi32(_mm256_add_epi32(value, half), 21);
        }
        put(line, q, side, sums[0], sums[1]);
    }
}

static void across(uint8_t *line, int side) {
    if (own.x.taps <= 2) across_pairs(line, side);
    else if (own.x.groups == 1) across_by(line, side, 1);
    else across_by(line, side, own.x.groups);
}
/* pixels: width x height of 4 bytes; out: side x side of 3 bytes. */
static void resize(const uint8_t *pixels, size_t stride, int width, int height, int side, int is_mirrored, uint8_t *out) {
    triangle(&own.x, width, side, 14, is_mirrored);
    triangle(&own.y, height, side, 15, 0);
    int pairs = own.x.taps <= 2 ? 1 : own.x.groups * 2;
    for (int q = 0; q < side; q++)
        for (int pair = 0; pair < pairs; pair++)
            for (int i = 0; i < 4; i++) /* w0 w1 four times, then w2 w3 four times */
                memcpy(own.spread + ((q * pairs + pair) * 4 + i) * 2, own.x.weight + q * TAPS + pair * 2, 4);
    for (int o = 0; o < side; o++) {
        const int16_t *weight = own.y.weight + (size_t)o * TAPS;
        down(pixels + own.y.first[o] * stride, stride, width * 4, weight, own.y.count[o]);
        across(out + (size_t)o * side * 3, side);
    }
}

/* A box of a random share (0.08 to 1) of the area, ratio 3:4 to 4:3, cut down where it does not fit: x, y, width, height. */
static void draw_box(int width, int height, const double *draw, int *box) {
    double area = (0.08 + 0.92 * draw[0]) * width * height, ratio = exp((2 * draw[1] - 1) * log(4.0 / 3));
    int w = (int)lrint(sqrt(area * ratio)), h = (int)lrint(sqrt(area / ratio));
    box[2] = w < 1 ? 1 : w > width ? width : w;
    box[3] = h < 1 ? 1 : h > height ? height : h;
    box[0] = (int)(draw[2] * (width - box[2] + 1));
    box[1] = (int)(draw[3] * (height - box[3] + 1));
}

static int one(const uint8_t *data, size_t size, const double *draw, int side, int *box, uint8_t *out) {
    struct jpeg_decompress_struct *jpeg = &own.jpeg;
    if (!own.is_made) {
        jpeg->err = jpeg_std_error(&own.failure.manager);
        own.failure.manager.error_exit = on_error;
        own.failure.manager.output_message = on_message;
        if (setjmp(own.failure.jump)) return 1;
        jpeg_create_decompress(jpeg);
        own.is_made = 1;
    }
    if (setjmp(own.failure.jump)) {
        jpeg_abort_decompress(jpeg);
        return 1;
    }
    jpeg_mem_src(jpeg, (unsigned char *)data, size);
    jpeg_read_header(jpeg, TRUE);
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(jpeg);
    draw_box(jpeg->output_width, jpeg->output_height, draw, box);
    /* A column more to each side: colours of a crop's edge are interpolated from their neighbours. */
    JDIMENSION left = box[0] > 0 ? box[0] - 1 : 0, right = box[0] + box[2] + 1;
    if (right > jpeg->output_width) right = jpeg->output_width;
    JDIMENSION first = left, width = right - left;
    if (width < jpeg->output_width) jpeg_crop_scanline(jpeg, &first, &width);
    size_t stride = (size_t)width * 4, need = stride * box[3] + 64;
    if (width > ROW) on_error((j_common_ptr)jpeg);
    if (need > own.room) {
        free(own.pixels);
        own.pixels = malloc(own.room = need + need / 2);
    }
    if (box[1] > 0) jpeg_skip_scanlines(jpeg, box[1]);
    for (int y = 0; y < box[3];) {
        JSAMPROW rows[4];
        int count = 0;
        for (; count < 4 && y + count < box[3]; count++) rows[count] = own.pixels + stride * (y + count);
        y += jpeg_read_scanlines(jpeg, rows, count);
    }
    jpeg_abort_decompress(jpeg);
    resize(own.pixels + (box[0] - first) * 4, stride, box[2], box[3], side, draw[4] < 0.5, out);
    return 0;
}

/* data, size: encoded images; draws: 5 numbers in [0, 1) each; boxes: 4 ints each, filled; out: side x side x 3 bytes each.
   Returns the number of images that could not be decoded. */
int crop_images(const uint8_t *const *data, const size_t *size, int count, const double *draws, int side, int *boxes,
                uint8_t *out) {
    int bad = 0;
    if (side % 4 || side > SIDE) return count;
    for (int i = 0; i < count; i++)
        bad += one(data[i], size[i], draws + 5 * i, side, boxes + 4 * i, out + (size_t)i * side * side * 3);
    return bad;
}
