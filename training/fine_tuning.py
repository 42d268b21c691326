"""Fine-tuning: starts from another run's weights, or trains only a part of the network.

Scopes are prefixes of variable names, as in TF-Slim's training script:
`Xception/block14` selects every layer whose name starts with it.
"""

import collections

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
from common import errors

HEAD_SCOPE = 'Xception/Logits'

Restoration = collections.namedtuple('Restoration', [
    'init_fn',  # a Scaffold's, restores the weights
    'report',  # sentence on what was restored and what was left out
])


def trainable_variables(trainable_scopes=()):
  """Returns the default graph's trainable variables within the scopes; () selects all.

  Raises:
    checkpoints.CheckpointError: a scope has no trainable variable.
  """
  variables = tf.trainable_variables()
  _require_known(trainable_scopes, variables, '--trainable_scopes')
  return [variable for variable in variables
          if not trainable_scopes or variable.op.name.startswith(tuple(trainable_scopes))]


def moving_statistics(trainable_scopes=()):
  """Returns the moving means and variances within the scopes; () selects all."""
  trainable = {variable.ref() for variable in tf.trainable_variables()}
  return [variable for variable in slim.get_model_variables()
          if variable.ref() not in trainable
          and (not trainable_scopes or variable.op.name.startswith(tuple(trainable_scopes)))]


def arg_scope(trainable_scopes=()):
  """Returns an arg scope, for use within `xception_arg_scope()`, that freezes other batch norms.

  A batch norm outside the scopes normalizes with its moving statistics and does
  not update them, so later layers see the same inputs as during evaluation.
  """
  def batch_norm(inputs, **kwargs):
    statistics = f'{tf.get_variable_scope().name}/BatchNorm/moving_mean'
    if not statistics.startswith(tuple(trainable_scopes)):
      kwargs['is_training'] = False
    return slim.batch_norm(inputs, **kwargs)

  if not trainable_scopes:
    return slim.arg_scope([])
  return slim.arg_scope([slim.conv2d, slim.separable_conv2d], normalizer_fn=batch_norm)


def restore(checkpoint_path, exclude_scopes=(), ignore_missing_vars=False, use_averages='auto'):
  """Prepares to restore the default graph's network from a checkpoint.

  A head with a different number of classes is left out.

  Args:
    checkpoint_path: a checkpoint, or a folder, which means its newest one.
    exclude_scopes: scopes whose variables keep their initial values.
    ignore_missing_vars: whether variables that the checkpoint lacks keep their
      initial values; otherwise they are an error.
    use_averages: 'auto', 'yes' or 'no', see `checkpoints.stored_names`.

  Returns:
    A Restoration.

  Raises:
    checkpoints.CheckpointError: there is no checkpoint, its variables do not
      fit, or a scope contains no variable.
  """
  checkpoint = checkpoints.find(None, checkpoint_path)
  stored = checkpoints.open_checkpoint(checkpoint).get_variable_to_shape_map()
  variables = slim.get_model_variables()
  _require_known(exclude_scopes, variables, '--checkpoint_exclude_scopes')
  wanted = [variable for variable in variables
            if not variable.op.name.startswith(tuple(exclude_scopes))]
  missing = [variable.op.name for variable in wanted if variable.op.name not in stored]
  others = [variable for variable in wanted
            if stored.get(variable.op.name, variable.shape) != variable.shape]
  _require_same_network(checkpoint, stored, wanted, missing, others)
  if missing and not ignore_missing_vars:
    raise checkpoints.CheckpointError(
        f'{checkpoint} lacks {len(missing)} of {len(wanted)} variables, first {missing[0]}. '
        'Leave them out with --checkpoint_exclude_scopes or --ignore_missing_vars')

  restored = [variable for variable in wanted
              if variable not in others and variable.op.name not in missing]
  if not restored:
    raise checkpoints.CheckpointError(f'Nothing is left to restore from {checkpoint}')
  names, are_averages = checkpoints.stored_names(
      checkpoint, [variable.op.name for variable in restored], use_averages)
  saver = tf.train.Saver({names[variable.op.name]: variable for variable in restored})
  report = (f'Starting from {len(restored)} of {len(variables)} variables of {checkpoint}, '
            f'{"their Polyak averages" if are_averages else "as trained, not averaged"}')
  if others:
    head = others[0]
    report += (f'; its head is left out: {stored[head.op.name][-1]} classes there, '
               f'{head.shape.as_list()[-1]} here')
  if missing:
    report += f'; {len(missing)} are missing, first {missing[0]}'

  def init_fn(scaffold, session):
    try:
      saver.restore(session, checkpoint)
    except (tf.errors.OpError, ValueError) as error:
      raise checkpoints.CheckpointError(
          f'{checkpoint} cannot be restored: {errors.reason(error)}') from error

  return Restoration(init_fn, report)


def _require_same_network(checkpoint, stored, wanted, missing, others):
  """Raises a CheckpointError if a checkpoint is of another network.

  Args:
    checkpoint: its path.
    stored: {name: shape} of its variables.
    wanted: the network's variables.
    missing: names of those that the checkpoint lacks.
    others: those that have another shape there.
  """
  misfits = [v for v in others if not v.op.name.startswith(HEAD_SCOPE)]
  if misfits:
    name = misfits[0].op.name
    raise checkpoints.CheckpointError(
        f'{checkpoint} holds another network: {len(misfits)} variables have other shapes, '
        f'{name} is {stored[name]} there and {misfits[0].shape.as_list()} here. Is '
        '--depth_multiplier the same?')
  if wanted and len(missing) == len(wanted):
    raise checkpoints.CheckpointError(
        f'{checkpoint} holds none of the {len(wanted)} variables of the network'
        + (', or holds them in the format of tf.train.Checkpoint: save them with '
           'tf.compat.v1.train.Saver' if '_CHECKPOINTABLE_OBJECT_GRAPH' in stored else
           f': it has {sorted(stored)[0]}, the network {missing[0]}'))


def _require_known(scopes, variables, option):
  for scope in scopes:
    if not any(variable.op.name.startswith(scope) for variable in variables):
      raise checkpoints.CheckpointError(
          f'{option} {scope}: no variable name starts with it. Layers have names such as '
          f'{variables[0].op.name.rpartition("/")[0]} and {HEAD_SCOPE}')
