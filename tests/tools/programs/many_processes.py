"""Processes, locks and shared memory (semaphores and segments lie in /dev/shm)."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import shared_memory


def square(number: int) -> int:
    return number * number


def count(lock, value) -> None:
    for _ in range(100):
        with lock:
            value.value += 1


def main() -> None:
    lock, value = multiprocessing.Lock(), multiprocessing.Value("i", 0)
    workers = [multiprocessing.Process(target=count, args=(lock, value)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print("lock:", value.value)
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            print(f"{method}:", pool.map(square, range(3)))
    mine = shared_memory.SharedMemory(create=True, size=64)
    mine.buf[0] = 7
    other = shared_memory.SharedMemory(mine.name)
    print("shared memory:", other.buf[0])
    other.close()
    mine.close()
    mine.unlink()
    with multiprocessing.Manager() as manager:
        print("manager:", list(manager.list([1])))
    with ProcessPoolExecutor(2) as executor:
        print("futures:", list(executor.map(square, range(3))))


if __name__ == "__main__":
    main()
