// The loop over the programs of a launch, around one kernel. Compiled with
//   KERNEL      the kernel's function, as MLIR names it for C
//   PARAMETERS  types of its parameters behind the two buffers that CANN would give it
//   ARGUMENTS   the same from `buffers` and `numbers`
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

typedef struct { void *allocated, *aligned; int64_t offset, size, stride; } memref;

void KERNEL(memref *, memref *, PARAMETERS, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t);

static inline float as_float(int64_t number) { float x; memcpy(&x, &number, sizeof x); return x; }

typedef struct {
    memref *buffers;
    const int64_t *numbers;
    int32_t num_programs;
    atomic_int next;    // program that nobody has begun
    atomic_int faulty;  // program that touched memory which is not mapped, or -1
    void *address;      // and where
} work;

static _Thread_local sigjmp_buf before_program;
static _Thread_local volatile sig_atomic_t in_program;
static _Thread_local void *fault_address;

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)context;
    if (!in_program) {  // somebody else's: as if we were not here
        signal(number, SIG_DFL);
        return;
    }
    fault_address = info->si_addr;
    siglongjmp(before_program, 1);
}

static void *run_programs(void *argument) {
    work *w = argument;
    memref *buffers = w->buffers, none = {0};
    const int64_t *numbers = w->numbers;
    (void)buffers; (void)numbers;
    for (volatile int program; (program = atomic_fetch_add(&w->next, 1)) < w->num_programs;) {
        if (sigsetjmp(before_program, 0)) {
            in_program = 0;
            int none_yet = -1;
            if (atomic_compare_exchange_strong(&w->faulty, &none_yet, program)) w->address = fault_address;
            atomic_store(&w->next, w->num_programs);
            break;
        }
        in_program = 1;
        KERNEL(&none, &none, ARGUMENTS, w->num_programs, 1, 1, program, 0, 0);
        in_program = 0;
    }
    return NULL;
}

// Returns -1, or the program that touched unmapped memory, at *address.
int32_t launch(memref *buffers, const int64_t *numbers, int32_t num_programs, int32_t num_threads, void **address) {
    work w = {buffers, numbers, num_programs, 0, -1, NULL};
    pthread_t threads[64];
    int32_t started = 0;
#ifndef SANITIZE  // the sanitizer has handlers of its own, and says more
    struct sigaction ours, segv, bus;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &ours, &segv);
    sigaction(SIGBUS, &ours, &bus);
#else
    (void)on_fault;
#endif
    while (started < num_threads - 1 && started < 64 && !pthread_create(&threads[started], NULL, run_programs, &w))
        started++;
    run_programs(&w);
    while (started) pthread_join(threads[--started], NULL);
#ifndef SANITIZE
    sigaction(SIGSEGV, &segv, NULL);
    sigaction(SIGBUS, &bus, NULL);
#endif
    *address = w.address;
    return atomic_load(&w.faulty);
}
