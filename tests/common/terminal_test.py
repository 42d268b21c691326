"""Tests of the width of text in a terminal."""

import tensorflow.compat.v1 as tf

from common import terminal


class TerminalTest(tf.test.TestCase):

  def test_text_width(self):
    for text, width in [('向日葵', 6), ('می\u200cخواهم', 7), ('गुलाब', 4), ('e\u0301', 1),
                        ('\u2067rose\u2069', 4)]:
      self.assertEqual(terminal.text_width(text), width, text)

  def test_pad(self):
    self.assertEqual([terminal.pad(text, 5) for text in ('向日', 'me\u0301', 'longer')],
                     ['向日 ', 'me\u0301   ', 'longer'])
