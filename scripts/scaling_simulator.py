"""A study's speed, simulated from the times of its parts: discrete events, in seconds.

Of each worker the simulation has the thread that reads, the one that prepares inputs (two batches
ahead) and the one that makes rows (two batches behind), as `mechvlm.study.running.beside` has them.
Workers share their node's cores. On a cluster a worker makes one shard at a time, and gets the next
one when the starting process has taken its files; that process writes them one after the other
(`mechvlm.study.running.ray_workers`).

What it leaves out: threads of one process that wait for Python's lock, caches that workers share,
Ray's own processes, and a network that others use.
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count

from mechvlm.study.running.beside import AHEAD, BEHIND
from mechvlm.study.running.settings import shard_size

Wait = Callable[[Callable[[], None]], None]
"""What a process waits for: it is given what to call when the wait is over."""
Process = Generator[Wait, None, None]


class Clock:
    """Runs processes: generators that yield what they wait for. Time is in seconds."""

    def __init__(self) -> None:
        self.now, self._events, self._number = 0.0, [], count()  # type: ignore[var-annotated]

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), action))

    def start(self, process: Process) -> None:
        def resume() -> None:
            wait = next(process, None)
            if wait is not None:
                wait(resume)

        resume()

    def pause(self, seconds: float) -> Wait:
        return lambda resume: self.after(seconds, resume)

    def run(self) -> None:
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


class Cores:
    """Processors that share their time evenly between those who want one each."""

    def __init__(self, clock: Clock, n: float):
        self.clock, self.n = clock, n
        self.busy = 0.0
        """Seconds of work done."""
        self._jobs: list[list] = []  # [seconds left, resume]
        self._since, self._version = 0.0, 0

    def work(self, seconds: float) -> Wait:
        def wait(resume: Callable[[], None]) -> None:
            self._advance()
            self._jobs.append([seconds, resume])
            self._plan()

        return wait

    def _speed(self) -> float:
        return min(1.0, self.n / max(1, len(self._jobs)))

    def _advance(self) -> None:
        done = (self.clock.now - self._since) * self._speed()
        for job in self._jobs:
            job[0] -= done
        self.busy += done * len(self._jobs)
        self._since = self.clock.now

    def _plan(self) -> None:
        self._version += 1
        if self._jobs:
            soonest = max(0.0, min(job[0] for job in self._jobs)) / self._speed()
            self.clock.after(soonest, lambda version=self._version: self._finish(version))

    def _finish(self, version: int) -> None:
        if version != self._version:
            return  # another job came meanwhile, and planned anew
        self._advance()
        ended = [job for job in self._jobs if job[0] < 1e-9]
        self._jobs = [job for job in self._jobs if job[0] >= 1e-9]
        self._plan()
        for _, resume in ended:
            resume()


class Store:
    """A queue between processes: `get` waits for something that is put."""

    def __init__(self, n: int = 0):
        self.n, self._waiting = n, deque()  # type: ignore[var-annotated]

    def put(self) -> None:
        if self._waiting:
            self._waiting.popleft()()
        else:
            self.n += 1

    def get(self) -> Wait:
        def wait(resume: Callable[[], None]) -> None:
            if self.n:
                self.n -= 1
                resume()
            else:
                self._waiting.append(resume)

        return wait


@dataclass(frozen=True)
class Costs:
    """Seconds of a study's parts: of one core an example, unless said otherwise.

    Attributes:
        prepare: opening an image, and the processor; in a thread of its own.
        device: the forward and what is read in it.
        join: what the reading thread does on the host, in turn with the device.
        rows: rows and words; in a thread of its own.
        shard: finishing a shard's tables and files, a shard.
        call: handing a worker its next shard, a shard; nobody's core.
        write: writing a shard, of the starting process, a shard.
        sync: waiting for the disk meanwhile, a shard.
        shard_bytes: size of a shard.
        on_cores: whether the device is a core of the node, and no GPU.
    """

    prepare: float
    device: float
    join: float
    rows: float
    shard: float
    call: float
    write: float
    sync: float
    shard_bytes: float
    on_cores: bool = False


@dataclass(frozen=True)
class Speed:
    """What a simulated study reached.

    Attributes:
        rate: examples a second, from the first shard to the last.
        device: share of the time in which a worker's device was busy.
        writer: share of the time in which the starting process was.
        traffic: bytes a second to the starting process.
    """

    rate: float
    device: float
    writer: float
    traffic: float


def simulate(costs: Costs, examples: int, workers: int, nodes: int, cores: int, batch: int = 16) -> Speed:
    """A study of `examples` on `workers`, spread over `nodes` of so many cores each.

    0 workers are one process without Ray: it prepares inputs across shards, and writes beside what
    follows. The starting process is on the first node.
    """
    clock = Clock()
    machines = [Cores(clock, cores) for _ in range(nodes)]
    n_batches = shard_size(batch) // batch
    shards = deque(range(examples // (n_batches * batch)))
    total, inbox = len(shards), Store()
    devices: list[Cores] = []
    writer, ended = [0.0], [0.0]

    def prepare(node: Cores, free: Store, made: Store, n: int) -> Process:
        for _ in range(n):
            yield free.get()
            yield node.work(batch * costs.prepare)
            made.put()

    def collect(node: Cores, given: Store, room: Store, all_done: Store, n: int, writes: bool) -> Process:
        for number in range(1, n + 1):
            yield given.get()
            yield node.work(batch * costs.rows)
            if writes and number % n_batches == 0:
                yield node.work(costs.shard + costs.write)
                yield clock.pause(costs.sync)
            room.put()
        all_done.put()

    def read(node: Cores, device: Cores, n: int, writes: bool) -> Process:
        """One run of batches, with its two threads beside it."""
        free, made, given, room, all_done = Store(AHEAD), Store(), Store(), Store(BEHIND), Store()
        clock.start(prepare(node, free, made, n))
        clock.start(collect(node, given, room, all_done, n, writes))
        for _ in range(n):
            yield made.get()
            free.put()
            yield device.work(batch * costs.device)
            yield node.work(batch * costs.join)
            yield room.get()
            given.put()
        yield all_done.get()
        ended[0] = clock.now

    def worker(node: Cores, device: Cores, calls: Store, taken: deque) -> Process:
        while True:
            yield calls.get()
            yield clock.pause(costs.call)
            yield from read(node, device, n_batches, False)
            yield node.work(costs.shard)
            taken.append(calls)
            inbox.put()

    def start_process(node: Cores, taken: deque) -> Process:
        for _ in range(total):
            yield inbox.get()
            began = clock.now
            calls = taken.popleft()
            if shards:
                shards.popleft()
                calls.put()
            yield node.work(costs.write)
            yield clock.pause(costs.sync)
            writer[0] += clock.now - began
            ended[0] = clock.now

    def device_of(node: Cores) -> Cores:
        devices.append(node if costs.on_cores else Cores(clock, 1))
        return devices[-1]

    if not workers:
        clock.start(read(machines[0], device_of(machines[0]), total * n_batches, True))
    else:
        taken: deque[Store] = deque()
        for number in range(workers):
            node, calls = machines[number % nodes], Store()
            clock.start(worker(node, device_of(node), calls, taken))
            if shards:
                shards.popleft()
                calls.put()
        clock.start(start_process(machines[0], taken))
    clock.run()
    seconds, n = ended[0], total * n_batches * batch
    traffic = total * costs.shard_bytes / seconds if workers else 0.0
    return Speed(n / seconds, n * costs.device / len(devices) / seconds, writer[0] / seconds, traffic)
