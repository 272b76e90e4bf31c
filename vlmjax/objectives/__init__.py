"""Training objectives: functions (model, batch) -> (loss, metrics), chosen by name.

The loss of a batch is a sum whose weights are in the batch, so the losses of micro-batches add up
to that of the batch.
"""

from vlmjax.objectives.sft import sft

OBJECTIVES = {"sft": sft}
