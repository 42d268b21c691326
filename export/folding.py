"""Folds the batch norms of a frozen graph into the convolutions that feed them.

At inference a batch norm multiplies each channel by one constant and adds another.
The convolution before it can do both: the factor goes into its kernel, the rest
into a bias.

  graph_def = folding.fold(graph_def, 'output')

The arithmetic is done by NumPy in float64; no graph is run.
"""

import collections

import numpy as np
import tensorflow.compat.v1 as tf

NORM_OPS = ('FusedBatchNorm', 'FusedBatchNormV2', 'FusedBatchNormV3')
CONVOLUTION_OPS = ('Conv2D', 'DepthwiseConv2dNative')


def fold(graph_def, output_name):
  """Folds batch norms, removes Identity nodes, and sorts the nodes that the output needs.

  A norm is left alone if it is in training mode, if one of its parameters is not
  a constant, or if its input is not a convolution (with or without a bias) that
  feeds nothing else.

  Args:
    graph_def: frozen tf.GraphDef without control inputs; it is not changed.
    output_name: name of the output node.

  Returns:
    A tf.GraphDef that computes the same up to float rounding. It has only the
    nodes that the output depends on, each after its inputs. A node that is still
    there has the same value, except convolutions whose norms were folded.

  Raises:
    ValueError: the graph has no such node, or a control input.
  """
  nodes = {node.name: tf.NodeDef.FromString(node.SerializeToString())
           for node in graph_def.node}
  if output_name not in nodes:
    raise ValueError(f'The graph has no node {output_name!r}')
  for node in nodes.values():
    if any(tensor.startswith('^') for tensor in node.input):
      raise ValueError(f'{node.name!r} has a control input: folding would change when it runs')
  nodes = _without_identities(nodes, output_name)
  num_uses = _count_uses(nodes)
  for node in _sorted_nodes(nodes, output_name):
    if node.op in NORM_OPS:
      _fold_norm(nodes, node, num_uses)
  return _graph_of(nodes, output_name, graph_def)


def delay_biases(graph_def, output_name):
  """Moves biases past the max pools and sums that they feed; two biases of a sum become one.

  Under tf.function, TensorFlow 2.21's remapper fails on a convolution's BiasAdd
  that feeds a residual sum ("fanout ... exist for missing node"), and then fuses
  nothing at all. OpenCV, on the other hand, accepts a bias only right after a
  convolution, so use this only for graphs that TensorFlow runs.

  Args:
    graph_def: tf.GraphDef from `fold`; it is not changed.
    output_name: name of the output node.

  Returns:
    A tf.GraphDef as from `fold`.
  """
  nodes = {node.name: tf.NodeDef.FromString(node.SerializeToString())
           for node in graph_def.node}
  num_uses = _count_uses(nodes)
  for node in _sorted_nodes(nodes, output_name):
    if node.op in ('MaxPool', 'Add', 'AddV2'):
      _delay_biases_of(nodes, node, num_uses)
  return _graph_of(nodes, output_name, graph_def)


def _without_identities(nodes, output_name):
  """Connects the consumers of each Identity directly to its source; the output stays as it is."""
  def source(tensor):
    tensor = tensor.removesuffix(':0')
    while tensor in nodes and nodes[tensor].op == 'Identity':
      tensor = nodes[tensor].input[0].removesuffix(':0')
    return tensor

  for node in nodes.values():
    node.input[:] = [source(tensor) for tensor in node.input]
  return {name: node for name, node in nodes.items()
          if node.op != 'Identity' or name == output_name}


def _node_name(tensor):
  return tensor.partition(':')[0]


def _count_uses(nodes):
  return collections.Counter(
      _node_name(tensor) for node in nodes.values() for tensor in node.input)


def _fold_norm(nodes, norm, num_uses):
  """Replaces a norm by a BiasAdd of the same name and scales the kernel, if that is possible."""
  if norm.attr['is_training'].b:
    return
  parameters = [_constant(nodes, tensor) for tensor in norm.input[1:]]
  convolution = nodes[_node_name(norm.input[0])]
  old_bias = np.zeros([])
  if convolution.op == 'BiasAdd' and num_uses[convolution.name] == 1:
    old_bias = _constant(nodes, convolution.input[1])
    convolution = nodes[_node_name(convolution.input[0])]
  if convolution.op not in CONVOLUTION_OPS or num_uses[convolution.name] != 1:
    return
  kernel = _constant(nodes, convolution.input[1])
  if any(constant is None for constant in (*parameters, old_bias, kernel)):
    return

  gamma, beta, mean, variance = (parameter.astype(np.float64) for parameter in parameters)
  scale = gamma / np.sqrt(variance + norm.attr['epsilon'].f)
  bias = beta + (old_bias.astype(np.float64) - mean) * scale
  if convolution.op == 'DepthwiseConv2dNative':
    # Output channel i * multiplier + j comes from kernel[:, :, i, j].
    scale = scale.reshape(kernel.shape[2:])
  convolution.input[1] = _add_constant(
      nodes, f'{convolution.name}/folded_kernel', (kernel * scale).astype(kernel.dtype))
  _add_bias(nodes, norm.name, convolution.name, bias.astype(kernel.dtype),
            norm.attr['data_format'])


def _delay_biases_of(nodes, node, num_uses):
  tensors, values = [], []
  for tensor in node.input:
    source = nodes[_node_name(tensor)]
    value = _constant(nodes, source.input[1]) if source.op == 'BiasAdd' else None
    if value is None or num_uses[source.name] != 1:
      tensors.append(tensor)
    else:
      tensors.append(source.input[0])
      values.append(value)
      data_format = source.attr['data_format']
  if values:
    # The biased result keeps the old name, so its consumers need not change.
    name, node.name = node.name, f'{node.name}/unbiased'
    node.input[:] = tensors
    nodes[node.name] = node
    _add_bias(nodes, name, node.name, sum(values), data_format)


def _constant(nodes, tensor):
  """Returns the value of a constant node, None for any other."""
  node = nodes.get(tensor)
  return tf.make_ndarray(node.attr['value'].tensor) if node and node.op == 'Const' else None


def _add_constant(nodes, name, value):
  nodes[name] = tf.NodeDef(name=name, op='Const', attr={
      'dtype': tf.AttrValue(type=tf.as_dtype(value.dtype).as_datatype_enum),
      'value': tf.AttrValue(tensor=tf.make_tensor_proto(value))})
  return name


def _add_bias(nodes, name, tensor, bias, data_format):
  nodes[name] = tf.NodeDef(
      name=name, op='BiasAdd', input=[tensor, _add_constant(nodes, f'{name}/folded_bias', bias)],
      attr={'T': tf.AttrValue(type=tf.as_dtype(bias.dtype).as_datatype_enum),
            'data_format': data_format})


def _graph_of(nodes, output_name, old_graph_def):
  graph_def = tf.GraphDef(versions=old_graph_def.versions, library=old_graph_def.library)
  graph_def.node.extend(_sorted_nodes(nodes, output_name))
  return graph_def


def _sorted_nodes(nodes, output_name):
  """Returns the nodes that the output depends on, each after its inputs."""
  done = {}
  stack = [output_name]
  while stack:
    name = stack[-1]
    waiting = [source for source in map(_node_name, nodes[name].input) if source not in done]
    if waiting:
      stack.extend(reversed(waiting))
    else:
      done.setdefault(name, nodes[name])
      stack.pop()
  return list(done.values())
