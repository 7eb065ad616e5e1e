# written by scripts/build_stubs.py from the catalog; do not edit

from cenote.mix.policies import Dense as Dense
from cenote.mix.policies import H2O as H2O
from cenote.mix.policies import KVPolicy as KVPolicy
from cenote.mix.policies import OracleTopK as OracleTopK
from cenote.mix.policies import Quest as Quest
from cenote.mix.policies import RandomKeys as RandomKeys
from cenote.mix.policies import SinkWindow as SinkWindow
from cenote.mix.tidaldecode.overlap import ChosenLayers as ChosenLayers
from cenote.mix.tidaldecode.overlap import Overlap as Overlap
from cenote.mix.tidaldecode.overlap import choose_layers as choose_layers
from cenote.mix.tidaldecode.overlap import overlap as overlap
from cenote.mix.tidaldecode.policy import TidalDecode as TidalDecode
from cenote.mix.tidaldecode.policy import attend_selected as attend_selected
from cenote.mix.tidaldecode.policy import rows_read as rows_read
from cenote.mix.tidaldecode.policy import speed_up as speed_up
