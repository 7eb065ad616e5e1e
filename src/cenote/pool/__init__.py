"""N vectors -> k vectors."""

from cenote.pool.attention.abmil import ABMIL
from cenote.pool.attention.abmilp import ABMILP, ABMILPPositions
from cenote.pool.attention.adaptive_noise_pooling.attenuator import Attenuator
from cenote.pool.attention.adaptive_noise_pooling.pool import AdaptiveNoisePool
from cenote.pool.attention.aim import AimPool
from cenote.pool.attention.attsets.faset import FASet
from cenote.pool.attention.attsets.pool import AttSets, AttSetsConv
from cenote.pool.attention.cae import CaePool
from cenote.pool.attention.cait import CaiTPool
from cenote.pool.attention.cbam import CbamPool
from cenote.pool.attention.clip import ClipPool
from cenote.pool.attention.coca import CoCaPool
from cenote.pool.attention.deep_set import DeepSet
from cenote.pool.attention.dicosa.query_bank import query_bank_normalise
from cenote.pool.attention.dicosa.similarity import DiCoSA
from cenote.pool.attention.dicosa.temporal import TemporalTransformer
from cenote.pool.attention.dinovit import DinoViTPool
from cenote.pool.attention.dolg import DolgPool
from cenote.pool.attention.efficient_probing import EfficientProbing
from cenote.pool.attention.esimpool import ESimPool
from cenote.pool.attention.jepa import JepaPool
from cenote.pool.attention.joint_attention.field import FieldHead
from cenote.pool.attention.joint_attention.fusion import JointAttentionFusion
from cenote.pool.attention.joint_attention.model import JointAttention
from cenote.pool.attention.joint_attention.pool import JointAttentionPool
from cenote.pool.attention.joint_attention.targets import best_point, gaussian_target
from cenote.pool.attention.mhca import MHCAPool
from cenote.pool.attention.pma import PMA
from cenote.pool.attention.set_attention import ISAB, MAB, SAB
from cenote.pool.attention.set_transformer.clustering import GaussianMixtures, sample_mixtures
from cenote.pool.attention.set_transformer.model import SetTransformer
from cenote.pool.attention.siglip import SigLipPool
from cenote.pool.attention.simpool import SimPool
from cenote.pool.attention.slotcon.grouping import SemanticGrouping
from cenote.pool.attention.slotcon.model import SlotCon
from cenote.pool.attention.slotcon.trainer import SlotConTrainer
from cenote.pool.attention.slotcon.views import TwoCrops
from cenote.pool.attention.tree_cross_attention.objective import TreeLosses, TreeObjective
from cenote.pool.attention.tree_cross_attention.pool import TreeCrossAttentionPool
from cenote.pool.attention.tree_cross_attention.retreever import ReTreever
from cenote.pool.attention.tree_cross_attention.search import Retrieved, TreeCrossAttention
from cenote.pool.bags.midam.loss import MIDAMAttentionLoss, MIDAMLoss, MIDAMSmoothedMaxLoss
from cenote.pool.bags.midam.optimizer import MIDAM
from cenote.pool.bags.midam.scorers import (
    AttentionStatistic,
    BagScorer,
    MIDAMAttention,
    MIDAMSmoothedMax,
    SmoothedMaxPool,
)
from cenote.pool.bags.midam.trainer import MIDAMTrainer, TwoClassBatches, sample_instances
from cenote.pool.base import PaddedPool, Pool, Pooled
from cenote.pool.basic.cls import ClsMeanPool, ClsPool
from cenote.pool.basic.last import LastPool
from cenote.pool.basic.max import MaxPool
from cenote.pool.basic.mean import MeanAllPool, MeanPool
from cenote.pool.basic.statistics import StatisticsPool
from cenote.pool.basic.sum import SumPool
from cenote.pool.graph.base import GraphLevel, GraphPool, GraphPooled
from cenote.pool.graph.graph_parsing_networks.model import GraphParsingNetwork, GraphParsingNodes, GraphParsingPool
from cenote.pool.graph.graph_parsing_networks.molecules import MoleculeEncoder
from cenote.pool.graph.graph_parsing_networks.parsing import EdgeScores
from cenote.pool.graph.sparse_hierarchical_graph import SparseHierarchicalClassifier, SparseHierarchicalPool
from cenote.pool.layers.base import LayerPool, LayersPooled, stack_layers
from cenote.pool.layers.maxpoolbert import CLSAttention, MaxCLS, MaxPoolBERT
from cenote.pool.layers.multi_layer_trainable import LastLayerTrainable, MultiLayerTrainable
from cenote.pool.layers.weighted_sum import WeightedLayerSum
from cenote.pool.sequence.aam_softmax import AamSoftmax
from cenote.pool.sequence.attention_conditioning import (
    AttentionalAffine,
    AttentionalConcat,
    AttentionalGate,
    ConditionedAttention,
    Lexicon,
)
from cenote.pool.sequence.attentive_mimicking.model import AgreementPool, AttentiveMimicking, Mimicked
from cenote.pool.sequence.attentive_statistics import AttentiveStatisticsPool
from cenote.pool.sequence.attentive_temporal_pooling.domain_adaptation import LinearCalibration, adapt_logits
from cenote.pool.sequence.attentive_temporal_pooling.pool import AttentiveTemporalPool, TemporalState
from cenote.pool.sequence.biomedical_re_pooling import (
    DependencyPool,
    DynamicPool,
    EntityPool,
    IndexSetPool,
    RelationPooled,
    RelationSentences,
)
from cenote.pool.sequence.cuni_multimodal import (
    FlatMemories,
    HierarchicalMemories,
    ImageMemory,
    Imagination,
    Memories,
    MemoriesAttended,
    MemoryAttention,
    ParallelMemories,
    SerialMemories,
    imagination_loss,
)
from cenote.pool.sequence.dependency_trees import Trees, pad_heads, parse_conllu, read_conllu
from cenote.pool.sequence.drasp import DraspPool
from cenote.pool.sequence.layer_aware_tdnn.fronts import D3Net, Ecapa2d
from cenote.pool.sequence.layer_aware_tdnn.model import LayerAttentionPool, LayerAwareTDNN, SpeakerStatisticsPool
from cenote.pool.sequence.sentiment_attitudes import (
    IMLPAttention,
    InteractiveAttention,
    LinAttention,
    MLPAttention,
    PiecewiseMaxPool,
    YangAttention,
    ZhouAttention,
    attention_penalty,
    mass_by_type,
)
from cenote.pool.sequence.sta_v2a.alignment import aa_align, onset_times
from cenote.pool.sequence.sta_v2a.generator import StaV2a, append_prompt
from cenote.pool.sequence.sta_v2a.onsets import StaV2aOnsets, onset_loss, onset_targets, window_mean
from cenote.pool.sequence.sta_v2a.prompt import FactorGraphAttention, StaV2aPrompt
from cenote.pool.sequence.weighted_mean import PositionWeightedMean
from cenote.pool.spatial.adapool.edscw import EDSCWPool1d, EDSCWPool2d, EDSCWPool3d, IDWPool1d, IDWPool2d, IDWPool3d
from cenote.pool.spatial.adapool.pool import AdaPool1d, AdaPool2d, AdaPool3d, AdaUnpool1d, AdaUnpool2d, AdaUnpool3d
from cenote.pool.spatial.atrous_rates import (
    effective_receptive_field,
    receptive_extent,
    recommend_rates,
    sweep_rates,
    valid_taps,
)
from cenote.pool.spatial.attentive_feature_aggregation.dla import AFADLAUp, AFAIDAUp, AFASegmenter
from cenote.pool.spatial.attentive_feature_aggregation.fusion import (
    AFAChannelAttention,
    AFASpatialAttention,
    BinaryAFA,
    MultiAFA,
    scale_space_rendering,
)
from cenote.pool.spatial.base import WindowPool
from cenote.pool.spatial.deeplab.dense_crf import DenseCRF, search_crf, unary_from_labels, unary_from_probabilities
from cenote.pool.spatial.deeplab.model import DeepLab, DeepLabASPP, MultiScale, score_map_loss
from cenote.pool.spatial.deeplab.permutohedral import PermutohedralLattice
from cenote.pool.spatial.deeplabv3 import (
    AtrousCascade,
    DeepLabV3,
    DeepLabV3ASPP,
    DeepLabV3Head,
    multi_grid,
    pixel_loss,
)
from cenote.pool.spatial.ggem.pool import GeM, GGeM
from cenote.pool.spatial.ggem.windows import GGeMPool1d, GGeMPool2d, GGeMPool3d
from cenote.pool.spatial.gramian_heads.loss import DecorrelationLoss, divergence_from_mean
from cenote.pool.spatial.gramian_heads.model import GramianHeads, GramianPool
from cenote.pool.spatial.mixed_gated_tree import (
    GatedPool1d,
    GatedPool2d,
    GatedPool3d,
    MixedPool1d,
    MixedPool2d,
    MixedPool3d,
    TreePool1d,
    TreePool2d,
    TreePool3d,
)
from cenote.pool.spatial.network_in_network import GlobalAveragePool, MLPConv, NetworkInNetwork, class_maps
from cenote.pool.spatial.output_stride import to_output_stride
from cenote.pool.spatial.softpool import SoftPool1d, SoftPool2d, SoftPool3d
from cenote.pool.spatial.tokenflex import TokenCountSampler, TokenFlex, check_placeholders
from cenote.pool.spatial.weighted import LeanWindowPool, WeightedWindowPool

__all__ = [
    "ABMIL",
    "ABMILP",
    "ISAB",
    "MAB",
    "MIDAM",
    "PMA",
    "SAB",
    "ABMILPPositions",
    "AFAChannelAttention",
    "AFADLAUp",
    "AFAIDAUp",
    "AFASegmenter",
    "AFASpatialAttention",
    "AamSoftmax",
    "AdaPool1d",
    "AdaPool2d",
    "AdaPool3d",
    "AdaUnpool1d",
    "AdaUnpool2d",
    "AdaUnpool3d",
    "AdaptiveNoisePool",
    "AgreementPool",
    "AimPool",
    "AtrousCascade",
    "AttSets",
    "AttSetsConv",
    "AttentionStatistic",
    "AttentionalAffine",
    "AttentionalConcat",
    "AttentionalGate",
    "AttentiveMimicking",
    "AttentiveStatisticsPool",
    "AttentiveTemporalPool",
    "Attenuator",
    "BagScorer",
    "BinaryAFA",
    "CLSAttention",
    "CaePool",
    "CaiTPool",
    "CbamPool",
    "ClipPool",
    "ClsMeanPool",
    "ClsPool",
    "CoCaPool",
    "ConditionedAttention",
    "D3Net",
    "DecorrelationLoss",
    "DeepLab",
    "DeepLabASPP",
    "DeepLabV3",
    "DeepLabV3ASPP",
    "DeepLabV3Head",
    "DeepSet",
    "DenseCRF",
    "DependencyPool",
    "DiCoSA",
    "DinoViTPool",
    "DolgPool",
    "DraspPool",
    "DynamicPool",
    "EDSCWPool1d",
    "EDSCWPool2d",
    "EDSCWPool3d",
    "ESimPool",
    "Ecapa2d",
    "EdgeScores",
    "EfficientProbing",
    "EntityPool",
    "FASet",
    "FactorGraphAttention",
    "FieldHead",
    "FlatMemories",
    "GGeM",
    "GGeMPool1d",
    "GGeMPool2d",
    "GGeMPool3d",
    "GatedPool1d",
    "GatedPool2d",
    "GatedPool3d",
    "GaussianMixtures",
    "GeM",
    "GlobalAveragePool",
    "GramianHeads",
    "GramianPool",
    "GraphLevel",
    "GraphParsingNetwork",
    "GraphParsingNodes",
    "GraphParsingPool",
    "GraphPool",
    "GraphPooled",
    "HierarchicalMemories",
    "IDWPool1d",
    "IDWPool2d",
    "IDWPool3d",
    "IMLPAttention",
    "ImageMemory",
    "Imagination",
    "IndexSetPool",
    "InteractiveAttention",
    "JepaPool",
    "JointAttention",
    "JointAttentionFusion",
    "JointAttentionPool",
    "LastLayerTrainable",
    "LastPool",
    "LayerAttentionPool",
    "LayerAwareTDNN",
    "LayerPool",
    "LayersPooled",
    "LeanWindowPool",
    "Lexicon",
    "LinAttention",
    "LinearCalibration",
    "MHCAPool",
    "MIDAMAttention",
    "MIDAMAttentionLoss",
    "MIDAMLoss",
    "MIDAMSmoothedMax",
    "MIDAMSmoothedMaxLoss",
    "MIDAMTrainer",
    "MLPAttention",
    "MLPConv",
    "MaxCLS",
    "MaxPool",
    "MaxPoolBERT",
    "MeanAllPool",
    "MeanPool",
    "Memories",
    "MemoriesAttended",
    "MemoryAttention",
    "Mimicked",
    "MixedPool1d",
    "MixedPool2d",
    "MixedPool3d",
    "MoleculeEncoder",
    "MultiAFA",
    "MultiLayerTrainable",
    "MultiScale",
    "NetworkInNetwork",
    "PaddedPool",
    "ParallelMemories",
    "PermutohedralLattice",
    "PiecewiseMaxPool",
    "Pool",
    "Pooled",
    "PositionWeightedMean",
    "ReTreever",
    "RelationPooled",
    "RelationSentences",
    "Retrieved",
    "SemanticGrouping",
    "SerialMemories",
    "SetTransformer",
    "SigLipPool",
    "SimPool",
    "SlotCon",
    "SlotConTrainer",
    "SmoothedMaxPool",
    "SoftPool1d",
    "SoftPool2d",
    "SoftPool3d",
    "SparseHierarchicalClassifier",
    "SparseHierarchicalPool",
    "SpeakerStatisticsPool",
    "StaV2a",
    "StaV2aOnsets",
    "StaV2aPrompt",
    "StatisticsPool",
    "SumPool",
    "TemporalState",
    "TemporalTransformer",
    "TokenCountSampler",
    "TokenFlex",
    "TreeCrossAttention",
    "TreeCrossAttentionPool",
    "TreeLosses",
    "TreeObjective",
    "TreePool1d",
    "TreePool2d",
    "TreePool3d",
    "Trees",
    "TwoClassBatches",
    "TwoCrops",
    "WeightedLayerSum",
    "WeightedWindowPool",
    "WindowPool",
    "YangAttention",
    "ZhouAttention",
    "aa_align",
    "adapt_logits",
    "append_prompt",
    "attention_penalty",
    "best_point",
    "check_placeholders",
    "class_maps",
    "divergence_from_mean",
    "effective_receptive_field",
    "gaussian_target",
    "imagination_loss",
    "mass_by_type",
    "multi_grid",
    "onset_loss",
    "onset_targets",
    "onset_times",
    "pad_heads",
    "parse_conllu",
    "pixel_loss",
    "query_bank_normalise",
    "read_conllu",
    "receptive_extent",
    "recommend_rates",
    "sample_instances",
    "sample_mixtures",
    "scale_space_rendering",
    "score_map_loss",
    "search_crf",
    "stack_layers",
    "sweep_rates",
    "to_output_stride",
    "unary_from_labels",
    "unary_from_probabilities",
    "valid_taps",
    "window_mean",
]
