// The loop over the programs of a launch, around one kernel. Compiled with
//   KERNEL      the kernel's function, as MLIR names it for C
//   PARAMETERS  types of its parameters behind the two buffers that CANN would give it
//   ARGUMENTS   the same from `buffers` and `numbers`
#define _GNU_SOURCE
#include <fenv.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

typedef struct { void *allocated, *aligned; int64_t offset, size, stride; } memref;

void KERNEL(memref *, memref *, PARAMETERS, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t);

static inline float as_float(int64_t number) { float x; memcpy(&x, &number, sizeof x); return x; }

typedef struct { void *address; int32_t program, signal; } fault;

typedef struct {
    memref *buffers;
    const int64_t *numbers;
    int32_t num_programs;
    atomic_int next;      // program that nobody has begun
    atomic_flag stopped;  // whether a program was stopped
    fault *first;
} work;

static _Thread_local sigjmp_buf before_program;
static _Thread_local volatile sig_atomic_t in_program;
static _Thread_local void *fault_address;

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE};
enum { NUM_SIGNALS = sizeof signals / sizeof *signals };
static struct sigaction previous[NUM_SIGNALS];

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)context;
    if (!in_program) {  // somebody else's: it happens again, as if we were not here
        for (int i = 0; i < NUM_SIGNALS; i++)
            if (signals[i] == number) sigaction(number, &previous[i], NULL);
        if (info->si_code <= 0) raise(number);  // but what was sent does not
        return;
    }
    fault_address = info->si_addr;
    siglongjmp(before_program, number);
}

static void *run_programs(void *argument) {
    work *w = argument;
    memref *buffers = w->buffers, none = {0};
    const int64_t *numbers = w->numbers;
    (void)buffers; (void)numbers;
    fenv_t callers;
    fegetenv(&callers);
    fesetenv(FE_DFL_ENV);  // numbers below the normal ones are numbers, whatever the caller made of them
    for (volatile int program; (program = atomic_fetch_add(&w->next, 1)) < w->num_programs;) {
        int signal = sigsetjmp(before_program, 0);
        if (signal) {
            in_program = 0;
            if (!atomic_flag_test_and_set(&w->stopped)) *w->first = (fault){fault_address, program, signal};
            break;
        }
        in_program = 1;
        KERNEL(&none, &none, ARGUMENTS, w->num_programs, 1, 1, program, 0, 0);
        in_program = 0;
    }
    fesetenv(&callers);
    return NULL;
}

// Runs programs 0 to num_programs - 1; where a signal stops one of them, the first is left in `first`.
void launch(memref *buffers, const int64_t *numbers, int32_t num_programs, int32_t num_threads, fault *first) {
    work w = {buffers, numbers, num_programs, 0, ATOMIC_FLAG_INIT, first};
    pthread_t threads[64];
    int32_t started = 0;
    struct sigaction ours;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &ours, &previous[i]);
    while (started < num_threads - 1 && started < 64 && !pthread_create(&threads[started], NULL, run_programs, &w))
        started++;
    run_programs(&w);
    while (started) pthread_join(threads[--started], NULL);
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &previous[i], NULL);
}
