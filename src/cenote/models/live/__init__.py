"""Reaching into a running model: the one instrument of all rooms.

`edited(model, *edits, spans=None)` changes attention and hidden states for as long as its block lasts; `recorded(model, ...)`
looks. The model is never wrapped, copied or renamed: the attention function that the user loaded stays and runs; where a few
rows are read or edited, these are computed beside it. `Shorten` is the edit that goes on with fewer tokens behind a block. On
leaving, the model is what it was. `denoising(pipeline, *edits, on_step=f)` is the same in a loop of diffusion, where f sees
and sets latents before each step. `states_before` and `from_states` run a model in two parts.

What it does not know: compiled modules; attention that a model writes out itself (an error at entry); packed sequences under
flash attention; other threads than the one that entered; attention outside of a model's blocks, such as pooling heads.
Maps that a model itself returns (`output_attentions=True`) do not show what a `RowEdit` changed. No architecture is known by
name.
"""

from cenote.models.live.calls import AttentionCall, Place
from cenote.models.live.decode import Branch, Branches, DecodingStep, plausible
from cenote.models.live.denoise import AttentionMaps, Denoising, DenoisingStep, Look, MapRecorder, denoising
from cenote.models.live.edited import Run, edited, recorded
from cenote.models.live.edits import (
    AttentionEdit,
    BlockEdit,
    Edit,
    HeadRecorder,
    InputsRecorder,
    Recorder,
    RowEdit,
    RowRecorder,
    StateRecorder,
    Trace,
    Where,
)
from cenote.models.live.heads import AblatedHeads, AddedStates, ScaledHeads
from cenote.models.live.neurons import FeedForward, NeuronRecorder, SlicedNeurons, feed_forwards
from cenote.models.live.parts import of_part
from cenote.models.live.places import attentions, blocks, embeddings, final_norm, stacks
from cenote.models.live.ran import Frozen, Layer, Normed, few_logits, frozen, layers, of_heads, one_stack
from cenote.models.live.reachable import Reach, reach
from cenote.models.live.shorten import Shorten, shortened
from cenote.models.live.shortening import Shortening
from cenote.models.live.split import from_states, stack_blocks, states_before
from cenote.models.live.swapped import AsMixer, as_mixer, swapped

__all__ = [
    "AblatedHeads",
    "AddedStates",
    "AsMixer",
    "AttentionCall",
    "AttentionEdit",
    "AttentionMaps",
    "BlockEdit",
    "Branch",
    "Branches",
    "DecodingStep",
    "Denoising",
    "DenoisingStep",
    "Edit",
    "FeedForward",
    "Frozen",
    "HeadRecorder",
    "InputsRecorder",
    "Layer",
    "Look",
    "MapRecorder",
    "NeuronRecorder",
    "Normed",
    "Place",
    "Reach",
    "Recorder",
    "RowEdit",
    "RowRecorder",
    "Run",
    "ScaledHeads",
    "Shorten",
    "Shortening",
    "SlicedNeurons",
    "StateRecorder",
    "Trace",
    "Where",
    "as_mixer",
    "attentions",
    "blocks",
    "denoising",
    "edited",
    "embeddings",
    "feed_forwards",
    "few_logits",
    "final_norm",
    "from_states",
    "frozen",
    "layers",
    "of_heads",
    "of_part",
    "one_stack",
    "plausible",
    "reach",
    "recorded",
    "shortened",
    "stack_blocks",
    "stacks",
    "states_before",
    "swapped",
]
