# written by scripts/build_stubs.py from the catalog; do not edit

from cenote.explain.attention_flow.explainers import AttentionFlow as AttentionFlow
from cenote.explain.attention_flow.explainers import AttentionRollout as AttentionRollout
from cenote.explain.attention_flow.matrices import augmented as augmented
from cenote.explain.attention_flow.matrices import max_flow as max_flow
from cenote.explain.attention_flow.matrices import over_heads as over_heads
from cenote.explain.attention_flow.matrices import rollout as rollout
from cenote.explain.captum import Captum as Captum
from cenote.explain.raw_attention import LastLayerAttention as LastLayerAttention
from cenote.explain.raw_attention import MeanAttention as MeanAttention
