# written by scripts/build_stubs.py from the catalog; do not edit

from cenote.mix.policies import Dense as Dense
from cenote.mix.policies import H2O as H2O
from cenote.mix.policies import KVPolicy as KVPolicy
from cenote.mix.policies import OracleTopK as OracleTopK
from cenote.mix.policies import Quest as Quest
from cenote.mix.policies import RandomKeys as RandomKeys
from cenote.mix.policies import SinkWindow as SinkWindow
