"""Learning rate schedules and optimizers, under the option names of TF-Slim's training script."""

import tensorflow.compat.v1 as tf


def configure_learning_rate(decay_type, learning_rate, decay_factor, end_learning_rate,
                            global_step, batch_size, num_samples, num_epochs_per_decay,
                            max_steps):
  """Returns the learning rate of this step, a float32 scalar tensor.

  Decay counts images seen, so it does not depend on the number of towers.

  Args:
    decay_type: 'fixed', 'exponential' (times decay_factor every
      num_epochs_per_decay epochs, in steps) or 'polynomial' (linear down to
      end_learning_rate at max_steps).
    learning_rate, decay_factor, end_learning_rate: floats; the rate never
      falls below end_learning_rate.
    global_step: int64 [].
    batch_size: images per step, summed over towers.
    num_samples: images per epoch.
    num_epochs_per_decay: float.
    max_steps: the step that training ends with.
  """
  if decay_type == 'fixed':
    return tf.constant(learning_rate)
  if decay_type == 'polynomial':
    return tf.train.polynomial_decay(learning_rate, global_step, max_steps,
                                     end_learning_rate)
  decays = tf.floor(tf.cast(global_step, tf.float64)
                    * (batch_size / (num_samples * num_epochs_per_decay)))
  rate = learning_rate * tf.cast(decay_factor, tf.float64)**decays
  return tf.maximum(tf.cast(rate, tf.float32), end_learning_rate)


def configure_optimizer(name, learning_rate, momentum, adam_beta1, adam_beta2,
                        rmsprop_decay, opt_epsilon):
  """Returns the tf.train.Optimizer called `name`: 'adam', 'rmsprop' or 'sgd'."""
  if name == 'adam':
    return tf.train.AdamOptimizer(learning_rate, adam_beta1, adam_beta2, opt_epsilon)
  if name == 'rmsprop':
    return tf.train.RMSPropOptimizer(learning_rate, rmsprop_decay, momentum, opt_epsilon)
  return tf.train.MomentumOptimizer(learning_rate, momentum)
