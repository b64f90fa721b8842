#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t STACK = 128 << 10;
constexpr int WARP = 32;

struct Barrier {
  int arrived = 0, count = 0;
  unsigned generation = 0;
  Site site = {}; // of the first of the waiting threads
  char order[2];  // addresses that ThreadSanitizer orders by, generation by generation
};

// Where a stack stands. swapcontext would ask the kernel for the signal mask each time.
using Place = void *[5];

struct Fiber {
  ucontext_t context; // to begin with
  Place place;
  std::unique_ptr<char[]> stack;
  uint3 index;
  int number = 0;
  bool done = false, started = false;
  Barrier *waits = nullptr;
  unsigned waits_generation = 0;
  void *tsan = nullptr, *fake_stack = nullptr;
};

struct Warp {
  Barrier barrier;
  unsigned char mailbox[WARP][MAILBOX];
};

struct Piece {
  const void *key;
  char *memory;
};

struct Block {
  dim3 grid, size;
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Piece> pieces;
  Barrier barrier;
  const std::function<void()> *kernel = nullptr;
  char *dynamic = nullptr;
  size_t shared_bytes = 0;
  const char *error = nullptr;
  Fiber *current = nullptr;
  Place scheduler;
  void *scheduler_tsan = nullptr, *scheduler_fake_stack = nullptr;
  const void *scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  char begin, end, allocation; // addresses that ThreadSanitizer orders by
};

uint64_t seed = 0;
std::string launched;
thread_local Block *running = nullptr;

[[noreturn]] __attribute__((noinline)) void go_to(Place place) { __builtin_longjmp(place, 1); }

void suspend() {
  Block *block = running;
  Fiber *fiber = block->current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fiber->done ? nullptr : &fiber->fake_stack, block->scheduler_stack,
                                 block->scheduler_stack_size);
#endif
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(block->scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  if (!__builtin_setjmp(fiber->place)) go_to(block->scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &block->scheduler_stack,
                                  &block->scheduler_stack_size);
#endif
}

void open(Barrier &barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
}

void wait(Barrier &barrier, [[maybe_unused]] bool orders_memory, Site site) {
  const unsigned generation = barrier.generation;
  if (barrier.arrived &&
      (barrier.site.line != site.line || std::strcmp(barrier.site.file, site.file)))
    running->error = "divergence: threads wait at different barriers or warp operations";
  barrier.site = site;
#ifdef EMULATOR_TSAN
  if (orders_memory) __tsan_release(&barrier.order[generation & 1]);
#endif
  if (++barrier.arrived >= barrier.count) {
    open(barrier);
  } else {
    Fiber *fiber = running->current;
    fiber->waits = &barrier;
    fiber->waits_generation = generation;
    while (barrier.generation == generation) suspend();
    fiber->waits = nullptr;
  }
#ifdef EMULATOR_TSAN
  if (orders_memory) __tsan_acquire(&barrier.order[generation & 1]);
#endif
}

void leave(Barrier &barrier) {
  if (--barrier.count > 0 && barrier.arrived >= barrier.count) open(barrier);
}

// Bytes of 0xFF are NaN in every floating type. No byte follows that an overrun could hit unseen.
char *poisoned(size_t bytes) {
  void *memory = nullptr;
  if (posix_memalign(&memory, 128, bytes)) throw std::bad_alloc();
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile char *>(memory)[i] = char(0xFF);
  return static_cast<char *>(memory);
}

void enter() {
  Block *block = running;
  Fiber *fiber = block->current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
  (*block->kernel)();
  fiber->done = true;
  leave(block->barrier);
  leave(block->warps[fiber->number / WARP].barrier);
#ifdef EMULATOR_TSAN
  __tsan_release(&block->end);
#endif
  suspend();
  std::abort();
}

void prepare(Fiber &fiber, int number, const Block &block) {
  if (!fiber.stack) fiber.stack.reset(new char[STACK]);
  const unsigned i = number;
  fiber.number = number;
  fiber.done = fiber.started = false;
  fiber.waits = nullptr;
  fiber.fake_stack = nullptr;
  fiber.index = {i % block.size.x, i / block.size.x % block.size.y,
                 i / block.size.x / block.size.y};
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
#ifdef EMULATOR_TSAN
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

// Runs a thread until it waits or ends.
void resume(Block &block, Fiber &fiber) {
  block.current = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), STACK);
#endif
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
  if (!fiber.started) __tsan_acquire(&block.begin);
#endif
  const bool begins = !fiber.started;
  fiber.started = true;
  if (!__builtin_setjmp(block.scheduler)) {
    if (begins) setcontext(&fiber.context);
    go_to(fiber.place);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void run_block(Block &block, std::mt19937_64 &random) {
  const int threads = block.fibers.size();
  int live = threads;
  std::vector<int> order(block.warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  while (live && !block.error) {
    bool has_moved = false;
    std::shuffle(order.begin(), order.end(), random);
    for (int warp : order)
      for (bool again = true; again && !block.error;) {
        again = false;
        const int first_lane = random() % WARP;
        for (int lane = 0; lane < WARP && !block.error; ++lane) {
          const int number = warp * WARP + (lane ^ first_lane);
          if (number >= threads) continue;
          Fiber &fiber = block.fibers[number];
          if (fiber.done) continue;
          if (fiber.waits && fiber.waits->generation == fiber.waits_generation) continue;
          resume(block, fiber);
          live -= fiber.done;
          again = has_moved = true;
        }
      }
    if (live && !has_moved && !block.error)
      block.error = "deadlock: a barrier or warp operation that some threads never reach";
  }
}

} // namespace

void set_seed(uint64_t value) { seed = value; }
uint3 thread_index() { return running->current->index; }
uint3 block_index() { return running->index; }
dim3 block_size() { return running->size; }
dim3 grid_size() { return running->grid; }
int lane() { return running->current->number % WARP; }

void block_barrier(Site site) { wait(running->barrier, true, site); }

void warp_barrier(bool orders_memory, Site site) {
  Warp &warp = running->warps[running->current->number / WARP];
  wait(warp.barrier, orders_memory, site);
}

// Volatile, byte by byte: a call of memcpy would be seen by the sanitizers.
void put(const void *value, int bytes) {
  auto *to = running->warps[running->current->number / WARP].mailbox[lane()];
  auto *from = static_cast<const volatile unsigned char *>(value);
  for (int i = 0; i < bytes; ++i) to[i] = from[i];
}

void get(int lane, void *value, int bytes) {
  auto *from = running->warps[running->current->number / WARP].mailbox[lane % WARP];
  auto *to = static_cast<volatile unsigned char *>(value);
  for (int i = 0; i < bytes; ++i) to[i] = from[i];
}

void *shared(const void *key, size_t bytes) {
  Block &block = *running;
  char *memory = nullptr;
  for (const Piece &piece : block.pieces)
    if (piece.key == key) memory = piece.memory;
  if (!memory) {
#ifdef EMULATOR_TSAN
    // Allocated in a fiber of its own: ordered before every user of the memory, after nothing else.
    void *allocator = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(allocator, __tsan_switch_to_fiber_no_sync);
#endif
    memory = poisoned(bytes);
    block.pieces.push_back({key, memory});
#ifdef EMULATOR_TSAN
    __tsan_release(&block.allocation);
    __tsan_switch_to_fiber(block.current->tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(allocator);
#endif
    block.shared_bytes += bytes;
    if (block.shared_bytes > SHARED_LIMIT) block.error = "more than 48 KB of shared memory";
  }
#ifdef EMULATOR_TSAN
  __tsan_acquire(&block.allocation);
#endif
  return memory;
}

void *dynamic_shared() { return running->dynamic; }

void run(dim3 grid, dim3 size, size_t dynamic, const std::function<void()> &kernel,
         const char *name) {
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (!threads || threads > 1024) throw std::runtime_error("emulator: block of a size not allowed");
  if (!blocks || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7FFFFFFF)
    throw std::runtime_error("emulator: grid of a size not allowed");
  if (dynamic > SHARED_LIMIT)
    throw std::runtime_error("emulator: more than 48 KB of shared memory");
  launched += name;
  launched += '\n';
  std::mt19937_64 random(seed);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);

  Block block;
  Block *const outer = running;
  running = &block;
  block.kernel = &kernel, block.grid = grid, block.size = size;
  block.fibers = std::vector<Fiber>(threads);
#ifdef EMULATOR_TSAN
  block.scheduler_tsan = __tsan_get_current_fiber();
  std::vector<void *> ended;
  __tsan_release(&block.begin);
#endif
  for (uint64_t number : order) {
    block.index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                   unsigned(number / grid.x / grid.y)};
    block.shared_bytes = dynamic;
    block.dynamic = dynamic ? poisoned(dynamic) : nullptr;
    block.barrier = {};
    block.barrier.count = threads;
    block.warps = std::vector<Warp>((threads + WARP - 1) / WARP);
    for (size_t i = 0; i < block.warps.size(); ++i)
      block.warps[i].barrier.count = std::min<int>(WARP, threads - i * WARP);
    for (uint64_t i = 0; i < threads; ++i) prepare(block.fibers[i], i, block);
    run_block(block, random);
#ifdef EMULATOR_TSAN
    // Fibers stay: a thread that takes the number of one that is gone hides a race with it. Memory
    // goes back in a fiber that is ordered after this block, so that the next block is not.
    for (Fiber &fiber : block.fibers) ended.push_back(fiber.tsan);
    void *reaper = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(reaper, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(&block.end);
    for (Fiber &fiber : block.fibers) fiber.stack.reset();
#endif
    for (const Piece &piece : block.pieces) std::free(piece.memory);
    std::free(block.dynamic);
    block.pieces.clear();
#ifdef EMULATOR_TSAN
    __tsan_switch_to_fiber(block.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(reaper);
#endif
    if (block.error) {
      running = outer;
      throw std::runtime_error(std::string("emulator: ") + block.error + ", in block " +
                               std::to_string(number));
    }
  }
#ifdef EMULATOR_TSAN
  for (void *fiber : ended) __tsan_destroy_fiber(fiber);
  __tsan_acquire(&block.end);
#endif
  running = outer;
}

} // namespace emulator

// Kernels launched since the last call, for tests that load them as a library.
extern "C" __attribute__((visibility("default"))) const char *emulator_launched() {
  static std::string result;
  result = std::move(emulator::launched);
  emulator::launched.clear();
  return result.c_str();
}
