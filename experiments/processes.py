"""One run by several processes, on one host or on many: they find each other, the first alone writes and prints.

All run the same program on the same numbers, so they take the same turns. What only the first can know, such as where a
checkpoint left off, it tells the others.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments import options
from experiments.options import option
from metasgd_jax.io import files
from metasgd_jax.outer import sharding
from metasgd_jax.tree import is_key
from metasgd_jax.types import PyTree

PATIENCE = 300
"""Seconds to wait for the other processes at the start."""
FAREWELL = 20
"""Seconds that a process which ends by an error waits for the others; then they are ended too."""


@dataclasses.dataclass(frozen=True)
class Machines:
  """Where a run is computed; it changes nothing but rounding, so none of it is in the configuration."""

  devices: int | None = option(
    None, 'Of each process, to share the tasks of a meta-iteration evenly; if not given one for regression, for '
    'the others as many as can.', low=1, high=100_000, kind=int,
  )  # fmt: skip
  distributed: bool = option(
    False, 'One of several processes that the cluster started (SLURM, Cloud TPU, Open MPI), which says who they are.'
  )
  coordinator: str | None = option(
    None, 'One of several processes, by hand: HOST:PORT of the first, the same for all.', kind=str
  )
  num_processes: int | None = option(None, 'With coordinator: how many there are.', low=1, high=100_000, kind=int)
  process_id: int | None = option(
    None, 'With coordinator: which of them this is, from 0, the first.', low=0, high=99_999, kind=int
  )

  def __post_init__(self):
    options.check(self)
    three = {name: getattr(self, name) for name in ('coordinator', 'num_processes', 'process_id')}
    given = {name: value for name, value in three.items() if value is not None}
    if self.distributed and given:
      raise ValueError(f'distributed finds {" and ".join(given)} by itself; leave out one or the other')
    if given and len(given) < 3:
      missing = ' and '.join(f'--{name}' for name in three if name not in given)
      got = ', '.join(f'{name}={value}' for name, value in given.items())
      raise ValueError(f'coordinator, num_processes and process_id go together, got {got}; give {missing} too')
    if self.coordinator is None or self.num_processes is None or self.process_id is None:
      return
    host, _, port = self.coordinator.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise ValueError(f'coordinator must be HOST:PORT, such as node1:1234, got {self.coordinator!r}')
    if self.process_id >= self.num_processes:
      raise ValueError(
        f'process_id must be less than num_processes={self.num_processes}, got {self.process_id}; they count from 0'
      )

  @property
  def several(self) -> bool:
    """Whether this is one of several processes, or is said to be."""
    return self.distributed or self.coordinator is not None


def main(prepare: Callable[[], Callable[[], object]], config_class: type) -> None:
  """Runs an experiment from the command line as `options.main` does, where the flags of `Machines` say.

  Args:
    prepare: as there.
    config_class: as there.
  """

  def prepare_all():
    machines = options.from_flags(Machines)
    if machines.several:
      start(machines)
    with together():
      return prepare()

  options.main(prepare_all, config_class)


def start(machines: Machines) -> None:
  """Joins the other processes; from here on the first alone prints, errors excepted.

  To be called before JAX is used.

  Raises:
    ValueError: there is no cluster to ask; or of a coordinator, the others do not come. A cluster's processes find each
      other by JAX, which aborts if one does not come.
  """
  if machines.process_id:
    _greet(str(machines.coordinator), machines.process_id)
  elif machines.coordinator is not None:
    _gather(machines.coordinator, int(machines.num_processes or 1))
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_enable_preemption_service', False)  # It takes SIGTERM for itself; see resuming.Stop.
  try:
    jax.distributed.initialize(
      machines.coordinator, machines.num_processes, machines.process_id, initialization_timeout=PATIENCE,
      shutdown_timeout_seconds=FAREWELL,
    )  # fmt: skip
  except (RuntimeError, ValueError) as e:
    reason = str(e).strip().splitlines()[0][:300]
    if machines.distributed:
      raise ValueError(
        f'no cluster tells of its processes ({reason}); give --coordinator=HOST:PORT, --num_processes and --process_id'
      ) from e
    raise ValueError(f'the processes cannot meet at {machines.coordinator} ({reason}); give another port') from e
  _keep_stdout(first())
  if not first():
    logging.set_verbosity(logging.WARNING)


def _keep_stdout(ours: bool) -> None:
  """Leaves stdout to the first process's `print`; what libraries write there (Gloo greets its peers) goes to stderr."""
  sys.stdout.flush()
  where = os.dup(1) if ours else os.open(os.devnull, os.O_WRONLY)
  os.dup2(2, 1)
  sys.stdout = os.fdopen(where, 'w', 1, sys.stdout.encoding)


def _greet(coordinator: str, process_id: int) -> None:
  """Tells the first process who is there, and waits until it has all; JAX would wait as well, but end with an abort.

  Raises:
    ValueError: the first process does not answer.
  """
  host, _, port = coordinator.rpartition(':')
  end = time.monotonic() + PATIENCE
  while True:
    try:
      with socket.create_connection((host.strip('[]'), int(port)), timeout=5) as peer:
        peer.sendall(process_id.to_bytes(4, 'big'))
        peer.settimeout(max(1.0, end - time.monotonic()))
        if peer.recv(1):
          return
      raise OSError('it ended before all were there')
    except OSError as e:
      if time.monotonic() > end or isinstance(e, socket.gaierror):
        raise ValueError(
          f'nobody answers at {coordinator} ({e.strerror or e}); start process 0 there, and let its port be reached'
        ) from e
      time.sleep(0.2)


def _gather(coordinator: str, num_processes: int) -> None:
  """Waits at the first process until all others have greeted, then lets them go on, and the port free for JAX.

  Raises:
    ValueError: they do not come, or the port is taken.
  """
  port, end = int(coordinator.rpartition(':')[2]), time.monotonic() + PATIENCE
  both = socket.has_dualstack_ipv6()
  with contextlib.ExitStack() as opened:
    try:
      door = socket.create_server(
        ('', port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=128, dualstack_ipv6=both
      )
    except OSError as e:
      raise ValueError(f'the processes cannot meet at {coordinator} ({e.strerror or e}); give another port') from e
    opened.enter_context(door)
    there: dict[int, socket.socket] = {}
    while missing := sorted(set(range(1, num_processes)) - set(there)):
      door.settimeout(max(0.01, end - time.monotonic()))
      try:
        peer = opened.enter_context(door.accept()[0])
      except TimeoutError:
        raise ValueError(
          f'the others do not come to {coordinator}: processes {", ".join(map(str, missing))} of {num_processes} are '
          f'missing after {PATIENCE} s; start them, and let the port be reached'
        ) from None
      peer.settimeout(5)
      with contextlib.suppress(OSError):  # Whoever says nothing, or too little, is none of them.
        who = peer.recv(4, socket.MSG_WAITALL)
        if len(who) == 4:
          there[int.from_bytes(who, 'big')] = peer
    for peer in there.values():
      with contextlib.suppress(OSError):
        peer.sendall(b'!')


def first() -> bool:
  """Whether this process is the one that writes and prints; the only one is."""
  return jax.process_index() == 0


def open_workdir(path: files.PathLike) -> pathlib.Path:
  """Returns the first process's directory as `files.open_workdir` does; of others one of their own, soon gone.

  So nothing is written twice, whatever is written; and only what the first sees must last.
  """
  if first():
    return files.open_workdir(path)
  scratch = tempfile.mkdtemp(prefix='metasgd-')
  atexit.register(shutil.rmtree, scratch, ignore_errors=True)
  return pathlib.Path(scratch)


def mesh_to_judge(num_tasks: int, devices: int | None) -> Mesh | None:
  """Returns devices to test on: as many of each process, up to `devices`, as share the tasks evenly.

  Where the processes cannot share them each tests on all of them, on one device: `None`.
  """
  processes = jax.process_count()
  most = min(devices or jax.local_device_count(), jax.local_device_count())
  fitting = [n for n in range(1, most + 1) if num_tasks % (n * processes) == 0]
  return sharding.task_mesh(num_tasks, devices=fitting[-1]) if fitting else None


def from_first(tree: PyTree) -> PyTree:
  """Returns the first process's tree in all, to the bit; elsewhere only shapes and dtypes are looked at."""
  if jax.process_count() == 1:
    return tree
  data = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)
  arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(data)]
  sent = multihost_utils.broadcast_one_to_all([np.frombuffer(array.tobytes(), np.uint8) for array in arrays])
  found = []
  for leaf, array, received in zip(jax.tree.leaves(tree), arrays, sent, strict=True):
    value: Any = np.frombuffer(np.asarray(received).tobytes(), array.dtype).reshape(array.shape)
    if isinstance(leaf, jax.Array):
      value = jax.numpy.asarray(value)
    found.append(jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if is_key(leaf) else value)
  return jax.tree.unflatten(jax.tree.structure(tree), found)


def json_from_first(value: Any) -> Any:
  """Returns the first process's value, of which JSON has the kinds, in all."""
  if jax.process_count() == 1:
    return value
  text = json.dumps(value).encode()
  size = int(from_first(np.int32(len(text))))
  sent = np.frombuffer(text, np.uint8) if first() else np.zeros(size, np.uint8)
  return json.loads(np.asarray(from_first(sent)).tobytes())


def any_of(here: bool) -> bool:
  """Whether it is so in any process."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.uint8(here)).any())


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Of a block that may fail in one process: ends the others too, with a sentence, where they would wait for it.

  Raises:
    SystemExit: another process has failed here.
  """
  try:
    yield
  except (Exception, SystemExit):
    any_of(True)
    raise
  if any_of(False):
    raise SystemExit('error: another process has failed, and says why')
