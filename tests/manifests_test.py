"""Tests of the cluster manifests: they parse, and their TF_CONFIG is valid."""

import json
import os
import subprocess
import tempfile
from unittest import mock

import tensorflow.compat.v1 as tf
import yaml

from deployment import cluster
from scripts import PROJECT

MANIFESTS = os.path.join(PROJECT, 'manifests')


def path(name):
  return os.path.join(MANIFESTS, name)


def find_workers(config):
  with mock.patch.dict(os.environ, {'TF_CONFIG': config}):
    return cluster.find_workers()


class ManifestsTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    # Holds stand-ins for python and Slurm's commands.
    self.bin = tempfile.mkdtemp(dir=self.get_temp_dir())

  def command(self, name, script):
    with open(os.path.join(self.bin, name), 'w', encoding='utf-8') as f:
      f.write(f'#!/bin/bash\n{script}\n')
    os.chmod(os.path.join(self.bin, name), 0o755)

  def run_script(self, command, **environment):
    environment = {'PATH': f'{self.bin}:{os.environ["PATH"]}', **environment}
    return subprocess.run(command, env=environment, cwd=self.bin, check=True, text=True,
                          capture_output=True).stdout

  def test_shell_scripts_parse(self):
    for name in ('train.slurm', 'demo.sh'):
      subprocess.run(['bash', '-n', path(name)], check=True)

  def test_kubernetes(self):
    with open(path('kubernetes.yaml'), encoding='utf-8') as f:
      service, policy, job = yaml.safe_load_all(f)
    self.assertEqual([document['kind'] for document in (service, policy, job)],
                     ['Service', 'NetworkPolicy', 'Job'])
    selector = {'job-name': job['metadata']['name']}
    self.assertEqual(service['spec']['clusterIP'], 'None')
    self.assertEqual(service['spec']['selector'], selector)
    self.assertEqual(policy['spec']['podSelector']['matchLabels'], selector)
    self.assertEqual(job['spec']['completionMode'], 'Indexed')
    pod = job['spec']['template']['spec']
    self.assertEqual(pod['restartPolicy'], 'OnFailure')
    self.assertEqual(pod['subdomain'], service['metadata']['name'])
    container, = pod['containers']
    size = int(container['env'][0]['value'])
    self.assertEqual((job['spec']['completions'], job['spec']['parallelism']), (size, size))

    self.command('python', 'echo "$TF_CONFIG"')
    config = self.run_script(container['command'], WORKERS=str(size), JOB_COMPLETION_INDEX='3')
    self.assertEqual(str(find_workers(config)), 'Worker 3 of 4, xception-3.xception:2222')

  def test_slurm(self):
    self.command('scontrol', 'printf "node1\\nnode2\\nnode7\\n"')
    self.command('srun', 'shift; SLURM_PROCID=2 "$@"')
    os.makedirs(os.path.join(self.bin, '.venv', 'bin'))
    self.command('.venv/bin/python', 'echo "$TF_CONFIG"; echo "$@" >&2')
    config = self.run_script(['bash', path('train.slurm')], SLURM_JOB_NODELIST='node[1-2,7]')
    self.assertEqual(json.loads(config)['task'], {'type': 'worker', 'index': 2})
    self.assertEqual(str(find_workers(config)), 'Worker 2 of 3, node7:2222')
