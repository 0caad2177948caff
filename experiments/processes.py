"""Runs an experiment in several processes, on one host or on many. Only the first process writes files and prints.

All processes run the same program and compute the same numbers, so they take the same branches. The first process
sends values that only it knows, such as the newest checkpoint, to the other processes.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
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
"""Seconds that a process waits for the other processes after it has failed. Then JAX ends the other processes too."""


@dataclasses.dataclass(frozen=True)
class Machines:
  """Options that say on which devices and processes a run is computed.

  These options change the results only by rounding errors, so they are not part of a `Config`.
  """

  devices: int | None = option(
    None,
    'Devices per process; by default as many as can share the tasks, but 1 in regression.',
    low=1,
    high=100_000,
    kind=int,
  )
  distributed: bool = option(False, 'Get the number of this process from the cluster: SLURM, Cloud TPU or Open MPI.')
  coordinator: str | None = option(None, 'Without a cluster: HOST:PORT of process 0, in all processes.', kind=str)
  num_processes: int | None = option(None, 'Number of processes; needs --coordinator.', low=1, high=100_000, kind=int)
  process_id: int | None = option(None, 'Number of this process; the first is 0.', low=0, high=99_999, kind=int)

  def __post_init__(self):
    options.check(self)
    three = {name: getattr(self, name) for name in ('coordinator', 'num_processes', 'process_id')}
    given = {name: value for name, value in three.items() if value is not None}
    if self.distributed and given:
      twice = f'--distributed gets {" and ".join(given)} from the cluster, but the command line gives values too'
      raise ValueError(f'{twice}; leave out either --distributed or these values')
    if given and len(given) < 3:
      missing = ' and '.join(f'--{name}' for name in three if name not in given)
      got = ', '.join(f'{name}={value}' for name, value in given.items())
      raise ValueError(
        f'coordinator, num_processes and process_id must be given together, got only {got}; give {missing} too'
      )
    if self.coordinator is None or self.num_processes is None or self.process_id is None:
      return
    host, _, port = self.coordinator.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise ValueError(f'`coordinator` must be HOST:PORT, such as node1:1234, got {self.coordinator!r}')
    if self.process_id >= self.num_processes:
      most = f'num_processes={self.num_processes}'
      raise ValueError(f'process_id must be less than {most}, got {self.process_id}; the first process is 0')


def start(machines: Machines) -> None:
  """Connects this process with the others. It does nothing if neither `coordinator` nor `distributed` is set.

  Call this function before JAX is used. After it, only the first process prints, and the other processes show only
  warnings and errors.

  Raises:
    ValueError: if `distributed` is set and there is no cluster, if the coordinator's host is not known, if a process
      does not connect to the coordinator in time, or if JAX cannot connect the processes. If `distributed` is set
      and a process is missing, there is no ValueError: JAX aborts the program.
  """
  coordinator = machines.coordinator
  if coordinator is None and not machines.distributed:
    return
  if coordinator is not None:
    host, _, port = coordinator.rpartition(':')
    try:
      socket.getaddrinfo(host.strip('[]'), int(port))
    except (socket.gaierror, UnicodeError) as e:
      advice = 'give the name or the address of the host of process 0'
      raise ValueError(f'coordinator={coordinator} has an unknown host ({e}); {advice}') from e
    if machines.process_id:
      _greet(coordinator, machines.process_id)
    else:
      _gather(coordinator, int(machines.num_processes or 1))
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_enable_preemption_service', False)  # The service would handle SIGTERM; see resuming.Run.
  timeouts: Any = dict(initialization_timeout=PATIENCE, shutdown_timeout_seconds=FAREWELL)
  try:
    jax.distributed.initialize(coordinator, machines.num_processes, machines.process_id, **timeouts)
  except (RuntimeError, ValueError) as e:
    who, advice = (
      'JAX cannot connect the processes of a cluster',
      'give --coordinator=HOST:PORT, --num_processes and --process_id',
    )
    if coordinator is not None:
      who, advice = (
        f'the processes cannot connect to coordinator={coordinator}',
        'give a host and a port that all of them reach',
      )
    reason = ' '.join(str(e).split())
    raise ValueError(f'{who} ({reason:.300}); {advice}') from e
  _keep_stdout(first())
  if not first():
    logging.set_verbosity(logging.WARNING)


def _keep_stdout(ours: bool) -> None:
  """Keeps stdout for Python's prints in the first process, and discards the prints of the other processes.

  In all processes, the text that libraries such as Gloo write to stdout goes to stderr instead.

  Args:
    ours: Whether this is the first process.
  """
  sys.stdout.flush()
  where = os.dup(1) if ours else os.open(os.devnull, os.O_WRONLY)
  os.dup2(2, 1)
  sys.stdout = os.fdopen(where, 'w', 1, sys.stdout.encoding, sys.stdout.errors)


def _greet(coordinator: str, process_id: int) -> None:
  """Sends the number of this process to the first process, and waits until all processes have connected.

  JAX would wait too, but if a process is missing, JAX aborts the program and does not say which process is missing.

  Raises:
    ValueError: if the first process does not answer.
  """
  host, _, port = coordinator.rpartition(':')
  end, reason = time.monotonic() + PATIENCE, 'the first process ended before all processes had connected'
  while True:
    try:
      with socket.create_connection((host.strip('[]'), int(port)), timeout=max(1, PATIENCE)) as first:
        first.sendall(process_id.to_bytes(4))
        if first.recv(1):
          return
    except OSError as e:
      reason = e.strerror or str(e)
    if time.monotonic() > end:
      advice = 'start process 0 on that host, and make sure that its port can be reached from this host'
      raise ValueError(f'process 0 does not answer at coordinator={coordinator} ({reason}); {advice}')
    time.sleep(0.2)


def _gather(coordinator: str, num_processes: int) -> None:
  """Waits in the first process until every other process has sent its process id to the port of `coordinator`.

  The first process then answers the other processes. The function closes the port before it returns, because JAX
  listens there next.

  Raises:
    ValueError: if a process does not connect in time, or if the first process cannot listen at the port, for example
      because another program uses it. If processes are missing, the message names them.
  """
  end = time.monotonic() + PATIENCE
  there: dict[int, socket.socket] = {}
  both = socket.has_dualstack_ipv6()
  address, family = ('', int(coordinator.rpartition(':')[2])), socket.AF_INET6 if both else socket.AF_INET
  with contextlib.ExitStack() as opened:
    try:
      server = opened.enter_context(socket.create_server(address, family=family, dualstack_ipv6=both))
      while missing := sorted(set(range(1, num_processes)) - there.keys()):
        server.settimeout(max(0.01, end - time.monotonic()))
        other = opened.enter_context(server.accept()[0])
        other.settimeout(5)
        with contextlib.suppress(OSError):  # Another program may connect and send nothing.
          there[int.from_bytes(other.recv(4))] = other
      for process_id in range(1, num_processes):
        there[process_id].sendall(b'!')
    except TimeoutError:
      names = f'processes {", ".join(map(str, missing))} of {num_processes} are missing after {PATIENCE} s'
      advice = 'start them, and make sure that the port can be reached from their hosts'
      raise ValueError(f'not all processes have connected to coordinator={coordinator}: {names}; {advice}') from None
    except OSError as e:
      raise ValueError(f'process 0 cannot listen at coordinator={coordinator} ({e.strerror}); give another port') from e


def first() -> bool:
  """Returns whether this is the first process, the only one whose files and prints are kept.

  If there is only one process, it is the first.
  """
  return jax.process_index() == 0


def open_workdir(path: files.PathLike) -> pathlib.Path:
  """Returns the work directory in the first process, and a temporary directory in the others.

  In this way, no two processes write the same file, and only the files of the first process are kept.
  """
  if first():
    return files.open_workdir(path)
  scratch = tempfile.TemporaryDirectory(prefix='metasgd-', ignore_cleanup_errors=True)
  atexit.register(scratch.cleanup)
  return pathlib.Path(scratch.name)


def mesh_to_judge(num_tasks: int, devices: int | None) -> Mesh | None:
  """Returns the largest mesh whose devices can share `num_tasks` test tasks evenly, for use in testing.

  The mesh has equally many devices of each process, at most `devices`. If `devices` is `None`, there is no such limit.
  If the processes cannot share the tasks evenly, the result is `None`, and each process tests on all tasks with one
  device. The result is also `None` if the mesh would have only one device.
  """
  processes = jax.process_count()
  most = min(devices or jax.local_device_count(), jax.local_device_count())
  fitting = [n for n in range(1, most + 1) if num_tasks % (n * processes) == 0]
  return sharding.task_mesh(num_tasks, devices=fitting[-1]) if fitting else None


def from_first(tree: PyTree) -> PyTree:
  """Returns, in every process, the `tree` of the first process, bit for bit.

  In the other processes, only the structure, the shapes and the dtypes of `tree` are used.
  """
  if jax.process_count() == 1:
    return tree
  data = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)
  gathered = multihost_utils.process_allgather(data)  # broadcast_one_to_all adds zeros, and so would change -0.0.
  return jax.tree.map(_from_first, tree, gathered)


def _from_first(leaf: Any, gathered: np.ndarray) -> Any:
  """Returns the value of the first process as a random key, a JAX array or a NumPy array, whichever `leaf` is.

  `gathered` has the values of all processes along its first axis.
  """
  if is_key(leaf):
    return jax.random.wrap_key_data(gathered[0], impl=jax.random.key_impl(leaf))
  return jax.numpy.asarray(gathered[0]) if isinstance(leaf, jax.Array) else gathered[0]


def json_from_first(value: Any) -> Any:
  """Returns in every process the `value` that the first process passed. JSON must be able to store the value."""
  if jax.process_count() == 1:
    return value
  text = json.dumps(value).encode()
  size = int(from_first(np.int32(len(text))))
  sent = from_first(np.frombuffer(text.ljust(size)[:size], np.uint8))
  return json.loads(sent.tobytes())


def any_of(here: bool) -> bool:
  """Returns whether `here` is true in any process. All processes must call this function."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.uint8(here)).any())


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A context manager that ends all processes if its `with` block fails in one of them.

  Without it, the other processes would wait for the failed process.

  Raises:
    SystemExit: if the block has failed in another process.
  """
  try:
    yield
  except (Exception, SystemExit):
    any_of(True)
    raise
  if any_of(False):
    raise SystemExit('error: another process has failed; the output of that process says why')
