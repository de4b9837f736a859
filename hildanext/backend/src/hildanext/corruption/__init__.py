"""From clean tokens to the noised batches that a model learns from. `hildanext.diffusion` draws the masks.

Read `noising` (a batch to its noised views), `noised_batches` (which of them a micro-batch trains on), `input_layout`
(what a forward is fed, and where each prediction is read), then `schedules`.
"""
