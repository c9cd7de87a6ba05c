// The tokens that may come next: logits in, a few candidates out, so that the host need not see all of them.
//
//   logits    (R, V) float; in place they become scores: ids that are not allowed get -infinity, ids of the history are
//             made less likely (multiplied by the penalty below 0, else divided by it)
//   allowed   (V,) bytes, 0 for ids that must not come out; or nothing
//   history   (R, longest) int32, each id once, -1 where there are no more
//   penalties (R,) float; 1 for none        wanted (R,) int32: so many of the best, at most kThreads
//   found     (R,) Found
//
// Each thread looks at every kThreads-th id and keeps its largest score. The wanted-th largest of these is reached by at
// least so many scores, and by few more: all that reach it, or fall short by no more than what a later division rounds
// away, are candidates. Their order is that of chance; their set is not.
// Grid: a block of kThreads for each row.

constexpr i32 kThreads = 1024;
constexpr i32 kMost = 512;  // candidates that are given; `count` says how many there were

struct Found {
    i32 count, is_broken;  // is_broken: a logit was not a number
    float best, mass;      // the largest score; the sum of exp(score - best)
    i32 ids[kMost];
    float scores[kMost];
};

MOSS_INLINE float infinity() { return __int_as_float(0x7f800000); }

MOSS_INLINE bool is_finite(float value) { return (__float_as_int(value) & 0x7f800000) != 0x7f800000; }

MOSS_INLINE float penalized(float score, float penalty) {
    const double wide = score, result = wide < 0 ? wide * penalty : wide / penalty;
    const double most = 3.4028234663852886e38;
    return (float)(result > most ? most : result < -most ? -most : result);
}

MOSS_WIDE_KERNEL(shortlist)
(float* logits, const u8* allowed, const i32* history, const float* penalties, const i32* wanted, Found* found,
 i32 vocabulary, i32 longest) {
    __shared__ float largest[kThreads];
    __shared__ float sums[kThreads / kWarp];
    __shared__ float bound, best;
    __shared__ i32 count, is_broken;
    const i32 row = (i32)blockIdx.x, thread = (i32)threadIdx.x;
    float* scores = logits + (i64)row * vocabulary;
    Found& out = found[row];
    if (thread == 0) {
        count = is_broken = 0;
        best = -infinity();
    }
    __syncthreads();
    for (i32 i = thread; i < vocabulary; i += kThreads) {
        if (!is_finite(scores[i])) is_broken = 1;
        if (allowed != nullptr && allowed[i] == 0) scores[i] = -infinity();
    }
    __syncthreads();
    const float penalty = penalties[row];
    if (penalty != 1.0f)
        for (i32 i = thread; i < longest; i += kThreads) {
            const i32 id = history[(i64)row * longest + i];
            if (id >= 0 && id < vocabulary && scores[id] > -infinity()) scores[id] = penalized(scores[id], penalty);
        }
    __syncthreads();

    float mine = -infinity();
    for (i32 i = thread; i < vocabulary; i += kThreads) mine = fmaxf(mine, scores[i]);
    largest[thread] = mine;
    __syncthreads();
    i32 before = 0;  // threads with a larger score, or the same and a lower number
    for (i32 i = 0; i < kThreads; i++) before += largest[i] > mine || (largest[i] == mine && i < thread);
    if (before == 0) best = mine;
    if (before == least(wanted[row], kThreads) - 1) bound = mine - fabsf(mine) * 1e-6f;
    __syncthreads();

    float mass = 0.0f;
    for (i32 i = thread; i < vocabulary; i += kThreads) {
        const float score = scores[i];
        mass += expf(score - best);
        if (score >= bound && score > -infinity()) {
            const i32 place = atomicAdd(&count, 1);
            if (place < kMost) {
                out.ids[place] = i;
                out.scores[place] = score;
            }
        }
    }
    mass = warp_sum(mass);
    if (thread % kWarp == 0) sums[thread / kWarp] = mass;
    __syncthreads();
    if (thread < kWarp) {
        mass = warp_sum(sums[thread]);
        if (thread == 0) {
            out.count = count;
            out.is_broken = is_broken;
            out.best = best;
            out.mass = mass;
        }
    }
}
