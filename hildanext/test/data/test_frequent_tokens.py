"""The most frequent tokens of documents, then the smallest ids."""

import numpy as np

from hildanext.data.frequent_tokens import frequent_tokens


def test_tokens_that_occur_come_before_those_that_do_not_and_ties_go_to_the_smaller_id():
    documents = [np.array([7, 7, 7, 5]), np.array([9, 5, 2])]
    assert frequent_tokens(documents, 2, 10) == [5, 7]
    assert frequent_tokens(documents, 3, 10) == [2, 5, 7]
    assert frequent_tokens(documents, 6, 10) == [0, 1, 2, 5, 7, 9]


def test_ids_that_the_vocabulary_does_not_have_are_not_counted():
    assert frequent_tokens([np.array([3, 30, 30, 30])], 1, 10) == [3]
