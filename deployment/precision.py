"""Number formats and XLA: which of them a machine supports, and how a session uses them."""

import os

import tensorflow.compat.v1 as tf
from tensorflow.core.protobuf import rewriter_config_pb2

# Grappler's own check: on a CPU that fails it, the graph would silently stay in float32.
from tensorflow.python.util import _pywrap_utils

from cpu_kernels import build
from deployment import towers

PRECISIONS = ('float32', 'bfloat16', 'float16')

# Operations that --precision bfloat16 leaves in float32 wherever cpu_kernels does not replace
# them: oneDNN's bfloat16 versions are slower than casts around the float32 ones, by 5 % of a
# training step on a CPU with AVX-512 and by 14 % on one with AMX.
FLOAT32_OPERATIONS = ('FusedBatchNormV3', 'FusedBatchNormGradV3',
                      'DepthwiseConv2dNativeBackpropFilter')


def check(precision, xla, devices):
  """Checks that the towers' devices support a number format and XLA.

  Args:
    precision: one of PRECISIONS.
    xla: whether XLA compiles the graph.
    devices: device of each tower.

  Raises:
    towers.DeviceError: they do not; the message says why.
  """
  on_cpu = devices[0].startswith('/cpu')
  if precision == 'float16' and on_cpu:
    raise towers.DeviceError('--precision float16 needs a GPU: on a CPU it is slower than '
                             'float32. Use bfloat16 or float32')
  if precision == 'bfloat16' and not on_cpu:
    raise towers.DeviceError('--precision bfloat16 needs a CPU: TensorFlow converts graphs to '
                             'bfloat16 on CPUs only. Use float16 or float32 on GPUs')
  if precision == 'bfloat16' and not _pywrap_utils.IsDataTypeSupportedByOneDNNOnThisCPU(
      tf.bfloat16.as_datatype_enum):
    raise towers.DeviceError('--precision bfloat16 needs a CPU with AVX-512 or newer, '
                             'which this one lacks. Use float32')
  if xla and on_cpu:
    raise towers.DeviceError('--xla needs a GPU: on a CPU it makes training six times slower')


def set_session_options(config, precision, xla):
  """Sets number format and XLA of a session; weights and moving statistics stay float32.

  Args:
    config: tf.ConfigProto, changed in place; bfloat16 also changes the process's environment.
    precision, xla: see `check`.
  """
  rewrites = config.graph_options.rewrite_options
  if precision == 'bfloat16':
    rewrites.auto_mixed_precision_onednn_bfloat16 = rewriter_config_pb2.RewriterConfig.ON
    # Grappler reads these lists from the environment only, at every rewrite, and rejects an
    # operation on two of them. Entries that the user has set are kept.
    for change, names in (('ALLOWLIST_ADD', build.OPERATIONS),
                          ('DENYLIST_ADD', FLOAT32_OPERATIONS),
                          ('ALLOWLIST_REMOVE', FLOAT32_OPERATIONS),
                          ('INFERLIST_REMOVE', FLOAT32_OPERATIONS)):
      name = f'TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_{change}'
      operations = {*filter(None, os.environ.get(name, '').split(',')), *names}
      os.environ[name] = ','.join(sorted(operations))
  if precision == 'float16':
    rewrites.auto_mixed_precision = rewriter_config_pb2.RewriterConfig.ON
  if xla:
    config.graph_options.optimizer_options.global_jit_level = tf.OptimizerOptions.ON_1


def scale_loss(optimizer):
  """Wraps an optimizer in loss scaling, without which small float16 gradients underflow.

  A step whose gradients are not finite is skipped and halves the scale; 2,000 finite steps
  double it (TensorFlow's defaults).
  """
  return tf.mixed_precision.MixedPrecisionLossScaleOptimizer(
      optimizer, tf.mixed_precision.DynamicLossScale())


def scales_loss(optimizer):
  """Returns whether `scale_loss` wrapped the optimizer."""
  return isinstance(optimizer, tf.mixed_precision.MixedPrecisionLossScaleOptimizer)
