"""Synchronous training on several workers: discovery, averaging, and a common end.

Every machine runs the same script with the same options; `TF_CONFIG` lists all workers
and says which one this is. Worker 0 is the chief. Each worker has its own graph, its own
copy of the weights and its own TensorFlow server. They communicate through collective
operations only, and every worker takes part in each of them.

  workers = cluster.find_workers()
  workers.start(session_config, startup_timeout_secs=600, step_timeout_secs=120)
  gradients = workers.average(gradients)

Without TF_CONFIG the only worker is a `SingleWorker`, which has nothing to exchange.
"""

import collections
import glob
import hashlib
import json
import math
import os
import socket
import sys
import threading
import time

import numpy as np
import tensorflow.compat.v1 as tf
from tensorflow.python.distribute import multi_worker_util
from tensorflow.python.ops import collective_ops

from common import files
from deployment import towers

GROUP_KEY, TOWERS_GROUP_KEY = 1, 2  # the groups of all workers and of their towers
# Workers match collectives by these numbers.
FIRST_GATHER_KEY, FIRST_TRAINING_KEY = 1, 1000
GATHER_BYTES = 16384  # per worker, a multiple of 4
# On loopback, smaller and larger buckets were slower.
BUCKET_BYTES = 4_000_000
PRECISIONS = {'float32': tf.float32, 'bfloat16': tf.bfloat16}

LOST_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
LEAVE_SECS = 10  # time to close a session whose peers are gone
PROBE_SECS = 1
WATCH_SECS = 0.1
RESTART_ADVICE = ('Restart all workers with the same commands; training resumes from the last '
                  'checkpoint')

# Errors of a session that has lost other workers.
LOST_PEER_ERRORS = (tf.errors.UnavailableError, tf.errors.AbortedError,
                    tf.errors.CancelledError, tf.errors.DeadlineExceededError)
# These may have the same cause, or be a fault of this worker.
PEER_ERRORS = (*LOST_PEER_ERRORS, tf.errors.InternalError, tf.errors.FailedPreconditionError,
               tf.errors.UnknownError)

ReducedStep = collections.namedtuple('ReducedStep', [
    'cross_entropy',  # float32 [], mean over the workers
    'accuracy',  # float32 [], mean over the workers
    'last_position',  # int64 [], maximum over the workers
])


class ClusterError(Exception):
  """The workers cannot train together; the message says why and what to do."""


def find_workers():
  """Reads TF_CONFIG.

  Returns:
    `Workers` of the cluster, or a `SingleWorker` if TF_CONFIG is unset or lists one.

  Raises:
    ClusterError: TF_CONFIG is malformed.
  """
  if not os.environ.get('TF_CONFIG', '').strip():
    return SingleWorker()
  example = ('{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, '
             '"task": {"type": "worker", "index": 0}}')
  try:
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    spec, task_type, task_id = resolver.cluster_spec(), resolver.task_type, resolver.task_id
    if not set(spec.jobs) <= {'chief', 'worker'}:
      raise ValueError('its jobs are ' + ', '.join(spec.jobs) + ', not chief and worker')
    if not spec.jobs or task_type is None or task_id is None:
      raise ValueError('it lacks "cluster" or "task"')
    size = multi_worker_util.worker_count(spec, task_type)
    index = multi_worker_util.id_in_cluster(spec, task_type, task_id)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ClusterError(f'TF_CONFIG is invalid ({error}): expected JSON like {example}, '
                       f'got {os.environ["TF_CONFIG"]}') from error
  return SingleWorker() if size == 1 else Workers(spec, task_type, task_id, size, index)


class SingleWorker:
  """A lone worker, and the interface of `Workers`: every exchange is the identity.

  Attributes:
    size: number of workers.
    index: index of this worker; 0 is the chief.
    is_chief: whether this worker writes checkpoints and summaries.
    device: device of its graph, for tf.device.
    master: target of its sessions.
    stopped_by: the worker that asked all others to stop, such as 'worker 1', or None.
  """
  size = 1
  index = 0
  is_chief = True
  device = None
  master = ''
  stopped_by = None

  def __str__(self):
    return ''

  def start(self, session_config, startup_timeout_secs, step_timeout_secs):
    """Starts this worker's server.

    Args:
      session_config: tf.ConfigProto of its sessions, completed in place.
      startup_timeout_secs: time limit in seconds for the first step.
      step_timeout_secs: time limit in seconds for each later step.

    Raises:
      ClusterError: the server cannot start.
    """

  def all_gather(self, value):
    """Returns a list of every worker's JSON-serializable value."""
    return [value]

  def require_same(self, settings):
    """Compares settings that must be the same on every worker.

    Args:
      settings: {name: JSON-serializable value}.

    Raises:
      ClusterError: two workers differ; the message names the setting and both values.
    """

  def average(self, tensors, precision='float32', bucket_bytes=BUCKET_BYTES):
    """Returns the means of float32 tensors over the workers, which wait here for the slowest.

    Args:
      tensors: list of float32 tensors of known shapes.
      precision: number format in which they are sent and added, one of PRECISIONS.
      bucket_bytes: see `make_buckets`.
    """
    return tensors

  def average_towers(self, tower_tensors, devices, precision='float32',
                     bucket_bytes=BUCKET_BYTES):
    """Returns the means over the towers of all workers: one list per tower, on its device.

    In float32 and on the CPU devices of one worker, they are those of
    `towers.average_gradients` to the bit.

    Args:
      tower_tensors: one list of float32 tensors of known shapes per tower.
      devices: device of each tower.
      precision, bucket_bytes: see `average`.
    """
    # A ring adds each chunk of a tensor in another order.
    in_order = self.size == 1 and not towers.on_gpus(devices)
    average = _gathered_mean if in_order else _all_reduced_mean
    means = []
    for tensors, device in zip(tower_tensors, devices):
      previous = []

      def average_bucket(flat, number, previous=previous):
        # NCCL, which is for GPUs, needs the same order everywhere.
        with tf.control_dependencies(previous):
          mean = average(flat, self.size * len(devices), number)
        previous[:] = [mean]
        return mean

      with tf.device(device):
        means.append(_average_in_buckets(tensors, precision, bucket_bytes, average_bucket))
    return means

  def average_variables(self, variables, updates):
    """Returns ops that run `updates`, then set the variables to their mean over the workers."""
    return updates

  def reduce_step(self, cross_entropy, accuracy, last_position):
    """Returns the ReducedStep over all workers."""
    return ReducedStep(cross_entropy, accuracy, last_position)

  def merge_evaluation(self, evaluation, num_images):
    """Merges the evaluations of all workers.

    Args:
      evaluation: evaluator.Evaluation of this worker's images.
      num_images: images of all workers, bad records included.

    Returns:
      The Evaluation of all images, the same on every worker; several workers drop the logits,
      which training does not need.
    """
    return evaluation

  def request_stop(self, run_context):
    """Ends training after this step, or once all workers have received the request."""
    run_context.request_stop()

  def hooks(self, check_weights_steps):
    """Returns the session hooks that synchronize the workers; they must precede all others.

    Args:
      check_weights_steps: steps between two comparisons of the weights.
    """
    return []

  def explain(self, error):
    """Returns a ClusterError if `error` means that other workers are gone, else None."""
    return None

  def leave(self):
    """Waits until all workers have ended."""


class Workers(SingleWorker):
  """The workers of a cluster, seen from the one that this process is."""

  def __init__(self, spec, task_type, task_id, size, index):
    """Initializes the workers; see `find_workers`.

    Args:
      spec: tf.train.ClusterSpec of jobs 'chief' and 'worker'.
      task_type, task_id: job of this process and its index in the job.
      size, index: number of workers and index of this one among them.
    """
    self.size = size
    self.index = index
    self.is_chief = index == 0
    self.device = f'/job:{task_type}/task:{task_id}'
    self.stopped_by = None
    self._spec = spec
    self._task = task_type, task_id
    self._addresses = [address for job in ('chief', 'worker') if job in spec.jobs
                       for address in spec.job_tasks(job)]
    self._next_key = FIRST_TRAINING_KEY
    self._next_gather_key = FIRST_GATHER_KEY
    self._array_sum = None
    self._wants_to_stop = False

  def __str__(self):
    return f'Worker {self.index} of {self.size}, {self._addresses[self.index]}'

  def start(self, session_config, startup_timeout_secs, step_timeout_secs):
    leader = multi_worker_util.collective_leader(self._spec, *self._task)
    session_config.experimental.collective_group_leader = leader
    session_config.isolate_session_state = True
    # A session needs no worker but the leader: others may start later or be gone.
    del session_config.device_filters[:]
    session_config.device_filters.extend(dict.fromkeys([leader.replace('/replica:0', ''),
                                                        self.device]))
    self._session_config = session_config
    self._step_timeout_secs = step_timeout_secs
    self._watchdog = _Watchdog(self)
    self._watchdog.expect(startup_timeout_secs, 'Not all workers connected',
                          '--startup_timeout_secs')
    job, task = self._task
    try:
      self._server = tf.train.Server(self._spec, job, task, config=session_config)
    except (tf.errors.OpError, RuntimeError) as error:
      raise ClusterError(f'{self} cannot start its server: {_first_line(error)}. Is its port '
                         'taken, or does the address belong to another machine?') from error
    self.master = self._server.target

  def all_gather(self, value):
    encoded = json.dumps(value).encode()
    if len(encoded) > GATHER_BYTES:
      raise ClusterError(f'{self}: its settings take {len(encoded)} bytes, but only '
                         f'{GATHER_BYTES} can be compared: shorten the longest option')
    rows = np.zeros([self.size, GATHER_BYTES // 4], np.int32)
    rows[self.index] = np.frombuffer(encoded.ljust(GATHER_BYTES), np.int32)
    key = self._next_gather_key
    self._next_gather_key += 1
    with tf.Graph().as_default(), tf.device(f'{self.device}/cpu:0'):
      total = self._all_reduce(tf.constant(rows), key, 'Id')
      try:
        with self.session() as session:
          rows = session.run(total)
      except tf.errors.InternalError as error:  # raised if workers disagree about the size
        raise ClusterError(f'{self}: TF_CONFIG lists {self.size} workers here and another '
                           'number elsewhere; it must list the same workers in the same order '
                           'everywhere') from error
      except PEER_ERRORS as error:
        raise self.explain(error) from error
    return [json.loads(row.tobytes()) for row in rows]

  def require_same(self, settings):
    all_settings = self.all_gather(settings)
    for index, others in enumerate(all_settings):
      for name, value in all_settings[0].items():
        if others.get(name) != value:
          raise ClusterError(
              f'Workers 0 ({self._addresses[0]}) and {index} ({self._addresses[index]}) cannot '
              f'train together: {name} is {value} and {others.get(name)}. Start all of them with '
              'the same options, data and code')

  def average(self, tensors, precision='float32', bucket_bytes=BUCKET_BYTES):
    with tf.device('/cpu:0'):
      return _average_in_buckets(
          tensors, precision, bucket_bytes,
          lambda flat, number: self._all_reduce(flat, self._new_key(), 'Div'))

  def average_variables(self, variables, updates):
    if not updates:  # frozen statistics are the same on every worker
      return updates
    with tf.control_dependencies(updates), tf.device('/cpu:0'):
      flat = tf.concat([tf.reshape(v.read_value(), [-1]) for v in variables], 0)
      mean = self._all_reduce(flat, self._new_key(), 'Div')
      split = tf.split(mean, [v.shape.num_elements() for v in variables])
    return [variable.assign(tf.reshape(part, variable.shape))
            for variable, part in zip(variables, split)]

  def reduce_step(self, cross_entropy, accuracy, last_position):
    self._stop_request = tf.placeholder_with_default(0.0, [])
    # float64 represents positions exactly.
    columns = [tf.cast(column, tf.float64) for column in (
        cross_entropy, accuracy, last_position, self._stop_request)]
    rows = self._gather(tf.stack(columns))
    self._stop_requests = rows[:, 3]
    return ReducedStep(tf.cast(tf.reduce_mean(rows[:, 0]), tf.float32),
                       tf.cast(tf.reduce_mean(rows[:, 1]), tf.float32),
                       tf.cast(tf.reduce_max(rows[:, 2]), tf.int64))

  def merge_evaluation(self, evaluation, num_images):
    self._watchdog.expect(self._step_timeout_secs, 'Not all workers evaluated',
                          '--step_timeout_secs')
    # Each image belongs to one worker, and the others add zeros: the sum is exact.
    rows = np.zeros([num_images, 3 + evaluation.probabilities.shape[1]], np.float32)
    rows[evaluation.positions] = np.column_stack([
        np.ones(len(evaluation.labels)), evaluation.labels, evaluation.losses,
        evaluation.probabilities])
    if self._array_sum is None:
      self._array_sum = _ArraySum(self, rows.shape)
    rows = self._array_sum(rows)
    positions = np.flatnonzero(rows[:, 0])
    return evaluation._replace(
        labels=rows[positions, 1].astype(np.int64), losses=rows[positions, 2],
        probabilities=rows[positions, 3:], logits=None, positions=positions)

  def request_stop(self, run_context):
    self._wants_to_stop = True

  def hooks(self, check_weights_steps):
    return [_SynchronizationHook(self, self._stop_request, self._stop_requests,
                                 check_weights_steps)]

  def checksums(self, variables):
    """Returns a checksum of every worker's variables, int64 [size]."""
    with tf.device('/cpu:0'):
      sums = [tf.reduce_sum(tf.cast(tf.bitcast(variable.read_value(), tf.int32), tf.int64))
              for variable in variables if variable.dtype.base_dtype == tf.float32]
      return tf.reshape(self._gather(tf.reshape(tf.add_n(sums), [1])), [-1])

  def broadcast(self, variables):
    """Returns an op that copies the chief's variables to every worker."""
    ops = []
    for variable in variables:
      group = (variable.shape, variable.dtype.base_dtype, self.size, GROUP_KEY, self._new_key())
      with tf.device('/cpu:0'):
        if self.is_chief:
          ops.append(collective_ops.broadcast_send(variable.read_value(), *group))
        else:
          received = collective_ops.broadcast_recv(*group)
      if not self.is_chief:
        ops.append(variable.assign(received))
    return tf.group(*ops)

  def stop_all(self, index, run_context):
    """Ends training at the request of worker `index`."""
    self.stopped_by = f'worker {index}'
    run_context.request_stop()

  def wants_to_stop(self):
    """Returns whether this worker has asked to stop."""
    return self._wants_to_stop

  def expect_step(self):
    """Restarts the watchdog's countdown to the next step."""
    self._watchdog.expect(self._step_timeout_secs, 'Not all workers took a step',
                          '--step_timeout_secs')

  def explain(self, error):
    if not isinstance(error, PEER_ERRORS):
      return None
    # Closing the session may wait for its peers again.
    self._watchdog.expect(LEAVE_SECS, 'The session did not close', None)
    absent = self.absent()
    verdict = ('lost the other workers' if absent or isinstance(error, LOST_PEER_ERRORS) else
               'failed')
    return ClusterError(f'{self} {verdict} ({type(error).__name__}: {_first_line(error)}). '
                        f'{absent}{RESTART_ADVICE}')

  def leave(self):
    # The others' sessions would hang if this server ended first.
    self._watchdog.expect(self._step_timeout_secs, 'Not all workers ended', '--step_timeout_secs')
    self.all_gather('end')
    self._watchdog.expect(math.inf, None, None)

  def session(self):
    """Returns a session of the default graph on this worker's server."""
    return tf.Session(self.master, config=self._session_config)

  def add(self, tensor):
    """Returns the sum of a tensor over the workers."""
    return self._all_reduce(tensor, self._new_key(), 'Id')

  def absent(self):
    """Returns a sentence that names unreachable workers, or ''."""
    absent = [f'{index} ({address})' for index, address in enumerate(self._addresses)
              if index != self.index and not _is_listening(address)]
    return f'No answer from worker {", ".join(absent)}. ' if absent else ''

  def _all_reduce(self, tensor, key, final_op):
    return collective_ops.all_reduce(tensor, self.size, GROUP_KEY, key, 'Add', final_op,
                                     communication_hint='ring')

  def _new_key(self):
    self._next_key += 1
    return self._next_key

  def _gather(self, row):
    """Returns the 1-D tensors of all workers, stacked."""
    with tf.device('/cpu:0'):
      length = row.shape.num_elements()
      rows = tf.concat([tf.zeros([self.index * length], row.dtype), row,
                        tf.zeros([(self.size - 1 - self.index) * length], row.dtype)], 0)
      return tf.reshape(self._all_reduce(rows, self._new_key(), 'Id'), [self.size, length])


class _SynchronizationHook(tf.train.SessionRunHook):
  """Copies the chief's variables, compares the weights, and stops all workers at the same step."""

  def __init__(self, workers, stop_request, stop_requests, check_weights_steps):
    self._workers = workers
    self._stop_request = stop_request
    self._stop_requests = stop_requests
    self._check_weights_steps = check_weights_steps

  def begin(self):
    variables = tf.global_variables()
    self._broadcast = self._workers.broadcast(variables)
    self._initialize_mirrors = tf.local_variables_initializer()
    self._checksums = self._workers.checksums(variables)

  def after_create_session(self, session, coord):
    session.run(self._broadcast)
    session.run(self._initialize_mirrors)  # with what the chief sent
    self._step = session.run(tf.train.get_global_step())

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(
        self._stop_requests, {self._stop_request: float(self._workers.wants_to_stop())})

  def after_run(self, run_context, run_values):
    self._step += 1
    self._workers.expect_step()
    if self._step % self._check_weights_steps == 0:
      checksums = run_context.session.run(self._checksums)
      differing = np.flatnonzero(checksums != checksums[0])
      if len(differing):
        raise ClusterError(
            f'The weights of workers 0 and {differing[0]} differ after step {self._step}: one of '
            f'them has faulty memory or different code. {RESTART_ADVICE}')
    asking = np.flatnonzero(run_values.results)
    if len(asking):
      self._workers.stop_all(asking[0], run_context)


class _ArraySum:
  """Sums arrays of one shape over the workers, in a session of its own."""

  def __init__(self, workers, shape):
    with tf.Graph().as_default(), tf.device(f'{workers.device}/cpu:0'):
      self._array = tf.placeholder(tf.float32, shape)
      self._sum = workers.add(tf.reshape(self._array, [-1]))
      self._session = workers.session()
    self._shape = shape

  def __call__(self, array):
    return self._session.run(self._sum, {self._array: array}).reshape(self._shape)


class _Watchdog(threading.Thread):
  """Ends this process when the workers exceed a time limit.

  TensorFlow itself would wait forever for a peer that hangs or was never started.
  """

  def __init__(self, workers):
    super().__init__(daemon=True)
    self._workers = workers
    self._expectation = math.inf, 0, '', ''
    self.start()

  def expect(self, seconds, failure, option):
    """Starts a new countdown.

    Args:
      seconds: time limit.
      failure: what has failed after that time, such as 'Not all workers took a step'.
      option: the option that sets `seconds`, or None.
    """
    self._expectation = time.monotonic() + seconds, seconds, failure, option

  def run(self):
    while True:
      deadline, seconds, failure, option = self._expectation
      if time.monotonic() > deadline:
        source = f' ({option})' if option else ''
        sys.stdout.flush()
        print(f'train_flowers.py: {self._workers}: {failure} in {seconds:g} seconds{source}. '
              f'{self._workers.absent()}{RESTART_ADVICE}', file=sys.stderr, flush=True)
        os._exit(LOST_EXIT_CODE)
      time.sleep(WATCH_SECS)


def _all_reduced_mean(flat, num_towers, key):
  """Returns the mean of the towers' 1-D tensors: NCCL computes it on GPUs, a ring on CPUs."""
  return collective_ops.all_reduce(flat, num_towers, TOWERS_GROUP_KEY, key, 'Add', 'Div',
                                   communication_hint='nccl')


def _gathered_mean(flat, num_towers, key):
  """Returns the mean of the towers' 1-D tensors, computed as `towers.average_gradients` does."""
  gathered = collective_ops.all_gather(flat, num_towers, TOWERS_GROUP_KEY, key,
                                       communication_hint='ring')
  return tf.add_n(tf.split(gathered, num_towers)) / num_towers


def _average_in_buckets(tensors, precision, bucket_bytes, average):
  """Averages tensors; `average` is a function of a bucket's values and its number, from 1."""
  averaged = [None] * len(tensors)
  sizes = [tensor.shape.num_elements() * 4 for tensor in tensors]
  for number, bucket in enumerate(make_buckets(sizes, bucket_bytes), 1):
    parts = [tensors[i] for i in bucket]
    flat = tf.concat([tf.reshape(part, [-1]) for part in parts], 0)
    mean = tf.cast(average(tf.cast(flat, PRECISIONS[precision]), number), tf.float32)
    split = tf.split(mean, [part.shape.num_elements() for part in parts])
    for i, part, flat_part in zip(bucket, parts, split):
      averaged[i] = tf.reshape(flat_part, part.shape)
  return averaged


def make_buckets(sizes, bucket_bytes):
  """Groups tensors that are sent together.

  Buckets run from the last tensor to the first: the gradients of the last variables are
  ready first and are sent while the others are computed.

  Args:
    sizes: bytes of each tensor.
    bucket_bytes: size at which a bucket is full.

  Returns:
    List of lists of indices.
  """
  buckets, bucket, size = [], [], 0
  for i in reversed(range(len(sizes))):
    bucket.append(i)
    size += sizes[i]
    if size >= bucket_bytes:
      buckets.append(bucket)
      bucket, size = [], 0
  return buckets + [bucket] if bucket else buckets


def code_hash():
  """Returns a hash of the project's code: scripts, packages and C++ sources."""
  project = files.PROJECT_DIR
  packages = map(os.path.dirname, glob.glob('*/__init__.py', root_dir=project))
  names = sorted(name for folder in ('', *packages) for pattern in ('*.py', '*.cc')
                 for name in glob.glob(os.path.join(folder, pattern), root_dir=project))
  return text_hash('\n'.join(f'{name} {files.sha256(os.path.join(project, name))}'
                             for name in names))


def variables_hash():
  """Returns a hash of the names and shapes of the default graph's variables."""
  return text_hash('\n'.join(f'{variable.op.name} {variable.shape} {variable.dtype}'
                             for variable in tf.global_variables()))


def text_hash(text):
  """Returns a hash of 16 hexadecimal digits."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_listening(address):
  host, _, port = address.rpartition(':')
  try:
    with socket.create_connection((host.strip('[]'), int(port)), timeout=PROBE_SECS):
      return True
  except (OSError, ValueError):
    return False


def _first_line(error):
  message = error.message if isinstance(error, tf.errors.OpError) else str(error)
  return message.strip().splitlines()[0][:200]
