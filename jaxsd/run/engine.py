"""One engine for all pictures: slots on devices, filled and freed between steps.

A sampler is a table and noise is counted by (seed, row), so a picture's state is its latents, their
history and its own row number. A device runs one program of a fixed number of slots for a few rows
at a time, every slot at its own row of its own table. Between two runs a finished picture leaves
its slot and a waiting one takes it. A picture's bits depend neither on its slot, nor on what is in
the others, nor on the number of devices; on the number of slots they may.
"""

import collections
import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType

from jaxsd import sampling
from jaxsd.config import ModelConfig, TinyVAEConfig, VAEConfig
from jaxsd.images.reading import Picture
from jaxsd.run import hires, image_conditioning, sharded
from jaxsd.run.image_conditioning import InitImage
from jaxsd.run.inputs import inputs, program
from jaxsd.run.pipeline import check_tile
from jaxsd.run.replica import Kind, Replica, Stage, look
from jaxsd.run.request import Request
from jaxsd.run.resolving import resolve
from jaxsd.run.steps import beside, chunk
from jaxsd.run.text_conditioning import parse_for
from jaxsd.weights import Model, Network

ROWS = 4  # of a sampler's table that a program runs before it returns
MOST_SLOTS = 8
CPU_SLOTS, CPU_CELLS = 4, 64  # of more, or larger latents, a CPU makes no more in a second
AT_ONCE = {'cpu': 2}  # programs that a device runs at a time: one leaves cores idle
GROUPS = 2  # kinds of pictures that a lane works on in turns


Look = Callable[[Network], Picture]  # decodes what a picture is by now
Watch = Callable[['Task', Look], object]


class Task:
    """A picture on its way.

    future: uint8 [H,W,3], or the error that it came to. done, total: model calls. watch(task,
    look): called by a thread of the engine as they are done, after `every` rows of the table or
    sooner (None: when it suits); look(vae) -> what the picture is by now, uint8 [H',W',3], by a
    small VAE (a Network). denoised: what it is by now, latents [1,h,w,L] on the device, None before
    the first rows are done; decode() -> it as uint8 [1,H,W,3] and finite, by the model's own VAE.
    """

    def __init__(self, request: Request, stages: Sequence[Stage], init_image: InitImage,
                 watch: Watch | None = None, every: int | None = None) -> None:
        self.request, self.stages, self.init_image = request, list(stages), init_image
        self.watch, self.every = watch, every
        self.future = concurrent.futures.Future()
        self.number, self.latents = 0, None  # of the stage, and what the one before came to
        self.arrived, self.begun = time.monotonic(), None
        self.denoised: jax.Array | None = None
        self.decode: Callable | None = None
        self.preview: Picture | None = None  # this and the next: see serve.previews
        self.wanted = False
        self.turn = 0  # those of lower ones are begun first, and of the same the oldest
        self.done, self.total = 0, sum(int(stage.calls[-1]) for stage in stages)

    @property
    def stage(self) -> Stage:
        """The stage that it is in."""
        return self.stages[self.number]

    @property
    def slots(self) -> int:
        """How many a device has in the program that makes it."""
        return self.stages[0].kind.slots

    def cancel(self) -> bool:
        """Take it back: its slot is free after the rows that are on their way -> whether it was
        not done yet."""
        return self.future.cancel()

    def settle(self, image: Picture | BaseException) -> None:
        """What it came to, a picture or an error, unless it was taken back."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if isinstance(image, BaseException):
                self.future.set_exception(image)
            else:
                self.future.set_result(image)


class Engine:
    """Makes pictures on the devices of this host; threads may submit at once.

    model, refiner: Models, wherever their weights are; each of `devices` (None: the local ones)
    gets a copy. slots: pictures that a program denoises at once (None: see `slots_for`). lone: a
    picture that finds a lane with nothing to do and none beside it that waits has a program of one
    slot, which is fast; Task.slots says so. tile: pixels per side in which to decode, for less
    memory. spread: the weights are shared out over the devices, for models that do not fit on one;
    these then work together on `slots` each. at_once: programs that a device runs at a time (None:
    2 on CPU, else 1). rows: of a table, that a program runs before it returns.
    """

    lane: 'type[Lane]'  # set below

    def __init__(self, model: Model, refiner: Model | None = None, slots: int | None = None,
                 tile: int | None = None, devices: Sequence[jax.Device] | None = None,
                 spread: bool = False, at_once: int | None = None, rows: int = ROWS,
                 lone: bool = False) -> None:
        self.devices = list(devices or jax.local_devices())
        platform = self.devices[0].platform
        self.slots, self.lone = slots, lone
        if slots is not None and slots < 1:
            raise ValueError(f'slots={slots}: expected at least one picture')
        if refiner is not None:
            check_latents('refiner', refiner.config.vae, model.config.vae)
        self.config, self.tile, self.rows = model.config, latent_tile(tile, model.config), rows
        self.nets = [net for net in (model, refiner) if net is not None]
        self.spread, places = spread, self.devices
        at_once = at_once or AT_ONCE.get(platform, 1)
        if spread:
            at_once = 1  # two programs would wait for each other's collectives
            places = [jax.make_mesh((len(self.devices),), (sharded.AXIS,), devices=self.devices,
                                    axis_types=(AxisType.Auto,))]
        self.replicas = [Replica(self.nets, place, rows, self.tile) for place in places]
        self._changed = threading.Condition()  # guards all below, and what lanes are given
        self._waiting = []  # Tasks, in the order in which they are begun
        self._compiling, self._closed = set(), False  # Kinds
        self._compilers = concurrent.futures.ThreadPoolExecutor(2)
        self.lanes = [self.lane(self, replica) for _ in range(at_once) for replica in self.replicas]

    @property
    def capacity(self) -> int:
        """Pictures that are denoised at a time, at most."""
        each = self.slots or slots_for(self.devices[0].platform, 1)
        return self.replicas[0].width(each) * len(self.lanes)

    def __enter__(self) -> 'Engine':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what is not done is taken back."""
        with self._changed:
            self._closed = True
            tasks = [*self._waiting, *(task for lane in self.lanes for task in lane.tasks())]
            self._waiting.clear()
            self._changed.notify_all()
        for task in tasks:
            task.cancel()
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def resolve(self, requests: Sequence[Request]) -> list[Request]:
        """`run.resolve` with the model's config."""
        return resolve(requests, self.config)

    def survey(self, request: Request) -> tuple[tuple[Kind, ...], int]:
        """A resolved request -> the Kinds of its stages, and how many model calls it takes (of
        dpm_adaptive, at most). Raises as `prepare`."""
        stages, _ = self.prepare(request)
        return tuple(s.kind for s in stages), sum(int(s.calls[-1]) for s in stages)

    def prepare(self, request: Request,
                noise: np.ndarray | None = None) -> tuple[list[Stage], InitImage]:
        """A resolved request -> its Stages and its InitImage. Raises ValueError for what the model
        cannot make, and ValueError or OSError for files that cannot be read."""
        check_tile(self.tile, request.tiling)
        if request.hires is not None:
            return self._prepare_hires(request, noise)
        init_image = image_conditioning.load(request, self.config)
        if len(self.nets) == 1:
            found = [inputs(self.nets[0], [request], noise, [init_image])]
        else:
            plain = request.replace(  # they are made for the base model, or follow it
                controls=(), image_prompts=(), reference=None)
            found = [inputs(self.nets[0], [request], noise, [init_image], 'base'),
                     inputs(self.nets[1], [plain], self._nothing(request), [init_image], 'refiner')]
        rows = found[0].rows
        if self.spread and isinstance(rows, sampling.Custom):
            raise ValueError(f'{rows.rule.name}: expected a sampler without a step of its own '
                             'where the weights are spread over devices, which go row by row '
                             'together')
        for kind in ('deep_shrink', 'easycache', 'deepcache'):
            if self.spread and kind in request.guidance_options:
                raise ValueError(f'{kind}: expected none where the weights are spread over '
                                 'devices, which compute the same layers together')
        names = tuple(sorted(parse_for(self.nets[0], request).adapters))
        slots = self.slots_of(request)
        return [Stage(Kind(i, request.height, request.width, program(data), names * (i == 0),
                           slots), data._replace(factors=None))
                for i, data in enumerate(found)], init_image

    def _prepare_hires(self, request, noise):
        """The stages of both passes."""
        first, second = hires.passes(request)
        stages, init_image = self.prepare(first, noise)
        more, _ = self.prepare(second)
        upscaler, vae = request.hires.upscaler, self.config.vae
        hires.network(upscaler, self.nets[0])
        nothing = np.zeros((1, first.height // vae.factor, first.width // vae.factor,
                            vae.latent_channels), np.float32)
        enlarged = upscaler
        if not hires.in_latents(upscaler):
            nothing, enlarged = np.zeros((first.height, first.width, 3), np.uint8), 'lanczos'
        data = hires.second(more[0].inputs, enlarged, nothing)
        kind = more[0].kind._replace(shapes=program(data))
        stages += [Stage(kind, data, upscaler), *more[1:]]
        slots = self.slots_of(request)  # of both, as a picture has one number of them
        return [s._replace(kind=s.kind._replace(slots=slots)) for s in stages], init_image

    def slots_of(self, request: Request) -> int:
        """The slots of a device in the programs for a resolved request."""
        width, height = request.final_size
        return self.slots or slots_for(self.devices[0].platform,
                                       height * width // self.config.vae.factor ** 2)

    def _nothing(self, request):
        """In the place of the latents that a refiner will start from."""
        vae = self.config.vae
        return np.zeros((1, request.height // vae.factor, request.width // vae.factor,
                         vae.latent_channels), np.float32)

    def submit(self, request: Request, watch: Watch | None = None, noise: np.ndarray | None = None,
               every: int | None = None) -> Task:
        """Begin a resolved request's picture as soon as a slot is free -> Task. watch, every: see
        Task. noise [1,h,w,L]: to start from instead of the seed's own. Raises as `prepare`."""
        task = Task(request, *self.prepare(request, noise), watch, every)
        self.add([task])
        return task

    def add(self, tasks: Sequence[Task]) -> None:
        """Begin Tasks as soon as slots are free."""
        with self._changed:
            if self._closed:
                raise RuntimeError('the engine is closed')
            self._waiting = sorted([*self._waiting, *tasks], key=lambda task: task.turn)
            self._admit()

    def make(self, requests: Sequence[Request],
             watch: Callable[[list[Task], int, Look], object] | None = None,
             noise: np.ndarray | None = None, every: int | None = None) -> list[Picture]:
        """Pictures of resolved requests -> a list of uint8 [H,W,3].

        watch(tasks, i, look): as a Task's, i is the number of the picture; every: as there. noise
        [B,h,w,L]: as of `submit`. Raises the error that the first picture came to."""
        tasks = []
        for i, request in enumerate(requests):
            own = None if noise is None else noise[i:i + 1]
            tasks.append(Task(request, *self.prepare(request, own), watch and (
                lambda task, look, i=i: watch(tasks, i, look)), every))
        try:
            self.add(tasks)
            left = {task.future for task in tasks}
            while left:  # in short waits, so that signals are noticed
                done, left = concurrent.futures.wait(left, 0.2, 'FIRST_COMPLETED')
                for future in done:
                    future.result()
            return [task.future.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    @property
    def alive(self) -> bool:
        """Whether pictures can be made."""
        return not self._closed and all(lane.is_alive() for lane in self.lanes)

    def counts(self) -> tuple[int, int]:
        """-> pictures that wait for a slot, and that have one."""
        with self._changed:
            return len(self._waiting), sum(len(lane.tasks()) for lane in self.lanes)

    def compiles(self, task: Task) -> bool:
        """Whether a picture waits for its programs to be compiled."""
        with self._changed:
            return task.stage.kind in self._compiling and task in self._waiting

    def drop_waiting(self) -> None:
        """Take back all pictures that have no slot yet."""
        with self._changed:
            tasks, self._waiting = self._waiting, []
        for task in tasks:
            task.cancel()

    def warm(self, requests: Iterable[Request], slots: int | None = None) -> None:
        """Compile what resolved requests need, on all devices; slots: of the programs, None: those
        of `slots_of`."""
        found = {}
        for request in requests:
            for stage in self.prepare(request)[0]:
                kind = stage.kind._replace(slots=slots or stage.kind.slots)
                found[kind] = stage._replace(kind=kind)
        for stage in found.values():
            self.compile(stage)

    def compile(self, stage: Stage) -> None:
        """Compile what a stage needs, on all devices."""
        for replica in self.replicas:
            replica.programs(stage)

    def _admit(self):
        """Give waiting pictures to slots, in turn. The lock is held."""
        for task in list(self._waiting):
            if task.future.cancelled():
                self._waiting.remove(task)
                continue
            self._choose_slots(task)
            kind = task.stage.kind
            ready = [self._ready(stage) for stage in task.stages[task.number:]]
            if not ready[0]:
                continue
            if lanes := [lane for lane in self.lanes if lane.takes(kind)]:
                self._waiting.remove(task)
                min(lanes, key=lambda lane: len(lane.tasks())).take(task)
            elif not any(kind in lane.groups for lane in self.lanes):
                break  # until a lane is done with another kind: none may overtake it
        self._changed.notify_all()

    def _ready(self, stage):
        """Whether a stage's programs are there; else their compilation begins. The lock is held."""
        if all(replica.ready(stage.kind) for replica in self.replicas):
            return True
        if stage.kind not in self._compiling:
            self._compiling.add(stage.kind)
            self._compilers.submit(self._have_ready, stage)
        return False

    def _choose_slots(self, task):
        """With `lone`, choose the slots of a picture that has not begun. The lock is held."""
        if not self.lone or task.begun or task.number:
            return
        idle = sum(not lane.groups for lane in self.lanes)
        slots = 1 if len(self._waiting) <= idle else self.slots_of(task.request)
        task.stages = [s._replace(kind=s.kind._replace(slots=slots)) for s in task.stages]

    def _have_ready(self, stage):
        """Compile beside the lanes; what goes wrong is the error of all pictures of the kind."""
        problem = None
        try:
            self.compile(stage)
        except BaseException as error:
            problem = error
        with self._changed:
            self._compiling.discard(stage.kind)
            failed = [t for t in self._waiting if problem and any(
                one.kind == stage.kind for one in t.stages[t.number:])]
            self._waiting = [task for task in self._waiting if task not in failed]
            self._admit()
        for task in failed:
            task.settle(problem)

    def _go_on(self, task, latents):
        """A picture goes to the next model, before those that have not begun."""
        with self._changed:
            if self._closed:
                task.cancel()
            task.number, task.latents, task.turn = task.number + 1, latents, -1
            self._waiting.insert(0, task)
            self._admit()

    def _wait(self, lane):
        """Until a lane has something to do -> the slots of its kinds; None at the end."""
        with self._changed:
            for kind in [kind for kind, slots in lane.groups.items() if not any(slots)]:
                del lane.groups[kind]
            self._admit()
            self._changed.wait_for(lambda: self._closed or lane.groups)
            return None if self._closed else list(lane.groups.values())

    def _more(self, kind):
        """Whether a picture waits for a slot of this kind."""
        return any(task.stage.kind == kind for task in self._waiting)


class Lane(threading.Thread):
    """Feeds a replica: pictures of at most GROUPS kinds, in turns, a few rows at a time. groups:
    {Kind: its slots, each None or a picture}."""

    def __init__(self, engine: Engine, replica: Replica) -> None:
        super().__init__(daemon=True)
        self.engine, self.replica, self.groups = engine, replica, {}
        self._running = collections.deque()  # [(state, task, model calls then, decode)], begun
        self._finisher = concurrent.futures.ThreadPoolExecutor(1)
        self.start()

    def takes(self, kind: Kind) -> bool:
        """Whether there is a slot for a picture of this kind."""
        slots = self.groups.get(kind)
        return len(self.groups) < GROUPS if slots is None else None in slots

    def take(self, task: Task) -> None:
        """Give a picture a slot."""
        kind = task.stage.kind
        slots = self.groups.setdefault(kind, [None] * self.replica.width(kind.slots))
        slots[slots.index(None)] = _Slot(task)

    def tasks(self) -> list[Task]:
        """The pictures in its slots."""
        return [slot.task for slots in self.groups.values() for slot in slots if slot]

    def run(self) -> None:
        """What goes wrong with a group is its pictures' error; anything else ends the engine."""
        try:
            while (groups := self.engine._wait(self)) is not None:
                for slots in groups:
                    try:
                        self.advance(slots)
                    except Exception as error:
                        with self.engine._changed:  # nothing is taken between the two
                            failed, slots[:] = [*filter(None, slots)], [None] * len(slots)
                        for slot in failed:
                            slot.task.settle(error)
        except BaseException:
            self.engine.close()
            raise
        finally:
            self._finisher.shutdown(wait=False)

    def advance(self, slots: list) -> None:
        """Run some rows of the pictures of one kind; those that are through leave their slots."""
        for i, slot in enumerate(slots):
            if slot and slot.task.future.cancelled():
                slots[i] = None
        taken = list(slots)  # more may be taken meanwhile
        live = [slot for slot in taken if slot]
        if not live:
            return
        first, length = live[0], self.engine.rows
        programs = self.replica.programs(first.task.stage)
        for slot in live:
            if slot.state is None:
                self._begin(slot)
        left = [len(slot.calls) - slot.row for slot in live]
        every = [slot.task.every for slot in live if slot.task.every]
        more = self.engine._more(first.task.stage.kind)
        count = min(length, (min if more else max)(left), *every)
        # An empty slot runs idle rows of another's picture.
        rows = [slot.table(count, length) if slot else first.table(0, length) for slot in taken]
        states, going = programs.advance(
            [(slot.encoded, slot.state) for slot in (slot or first for slot in taken)],
            beside(rows), np.int32(count))
        going = np.asarray(going) if sampling.free(first.steps.row) else None
        begun = []
        for i, slot in enumerate(taken):
            if slot is None:
                continue
            slot.state, slot.row = states[i], min(slot.row + count, len(slot.calls))
            begun.append((slot.state, slot.task, slot.before + int(slot.calls[slot.row - 1]),
                          programs.decode))
            if slot.row == len(slot.calls) or going is not None and not going[i]:
                slots[i] = None
                self._end(slot, programs)
        self._running.append(begun)
        while len(self._running) > (not every):  # the next rows begin before these are done
            self._report(self._running.popleft())

    def _begin(self, slot):
        task = slot.task
        task.begun = task.begun or time.monotonic()
        slot.encoded, slot.state = self.replica.start(task.stage, task.latents)

    def _report(self, begun):
        """Wait for some rows and tell those who watch."""
        for state, task, done, decode in begun:
            jax.block_until_ready(state.x)
            if not task.future.done() and done > task.done:
                task.done = done
                self._show(task, state.denoised, decode)

    def _show(self, task, latents, decode):
        task.denoised, task.decode = latents, functools.partial(decode, latents)
        if task.watch is None:
            return
        try:
            task.watch(task, functools.partial(look, latents))
        except Exception as error:
            task.settle(error)

    def _end(self, slot, programs):
        task, latents = slot.task, slot.state.x
        following = task.stages[task.number + 1:]
        if following and following[0].upscaler:
            pixels = not hires.in_latents(following[0].upscaler)
            self._finisher.submit(self._enlarge, task, programs.decode(latents)[0][0] if pixels
                                  else latents)
        elif following:
            self.engine._go_on(task, latents)
        else:
            self._finisher.submit(self._finish, task, slot.state, programs.decode,
                                  programs.decode(slot.state.x))

    def _enlarge(self, task, found):
        """Give the next stage what the one before came to."""
        try:
            stage = task.stages[task.number + 1]
            net = hires.network(stage.upscaler, self.engine.nets[0])
            data = hires.second(stage.inputs, stage.upscaler, np.asarray(found), net)
            task.stages[task.number + 1] = stage._replace(inputs=data)
            self.engine._go_on(task, None)
        except Exception as error:
            task.settle(error)

    def _finish(self, task, state, decode, found):
        try:
            image, finite = map(np.asarray, found)
            if not finite.all():
                raise not_finite('the picture', task.request)
            task.done = task.total
            self._show(task, state.denoised, decode)
            task.settle(image_conditioning.paste_back(task.init_image, image[0]))
        except Exception as error:
            task.settle(error)


Engine.lane = Lane


class _Slot:
    """A picture that is being denoised: row is the next of its table."""

    def __init__(self, task):
        self.task, self.row, self.encoded, self.state = task, 0, None, None
        self.steps, self.calls = task.stage.inputs.steps, task.stage.calls
        self.before = sum(int(stage.calls[-1]) for stage in task.stages[:task.number])

    def table(self, count, length):
        """The next rows, at most `count`, and idle ones -> Steps [length,1]."""
        stop = min(self.row + count, len(self.calls))
        return chunk(self.steps, min(self.row, stop), stop, length)


def slots_for(platform: str, cells: int) -> int:
    """The slots that suit a kind of device and latents of so many cells. On a CPU one picture is
    enough, unless it is so small that the time goes into reading the weights."""
    if platform != 'cpu':
        return MOST_SLOTS
    return CPU_SLOTS if cells <= CPU_CELLS else 1


def check_latents(what: str, found: VAEConfig | TinyVAEConfig,
                  vae: VAEConfig | TinyVAEConfig) -> None:
    """ValueError where the latents of two models differ."""
    for name in ('latent_channels', 'factor'):
        if getattr(found, name) != getattr(vae, name):
            raise ValueError(f'{what}: expected latents like the model\'s, {name} '
                             f'{getattr(vae, name)}; found {getattr(found, name)}')


def latent_tile(tile: int | None, config: ModelConfig) -> int | None:
    """Pixels per side of a tile -> latents, or None. Raises ValueError for parts of latents."""
    if tile is None:
        return None
    if tile < config.vae.factor or tile % config.vae.factor:
        raise ValueError(f'tile={tile}: expected a multiple of {config.vae.factor} pixels')
    return tile // config.vae.factor


def not_finite(what: str, request: Request) -> ValueError:
    """The error for a picture that is none."""
    return ValueError(
        f'{what} (seed {request.seed}) is not finite: the weights hold NaN or infinity, or '
        'overflow in their dtype (float16: try bfloat16 or float32)')
