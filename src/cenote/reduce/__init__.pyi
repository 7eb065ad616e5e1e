# written by scripts/build_stubs.py from the catalog; do not edit

from cenote.reduce.base import Budget as Budget
from cenote.reduce.base import BudgetReducer as BudgetReducer
from cenote.reduce.base import Reducer as Reducer
from cenote.reduce.basic.controls import EvenlySpacedTokens as EvenlySpacedTokens
from cenote.reduce.basic.controls import FirstTokens as FirstTokens
from cenote.reduce.basic.controls import RandomTokens as RandomTokens
from cenote.reduce.basic.controls import TopAttentionTokens as TopAttentionTokens
from cenote.reduce.basic.controls import TopTokens as TopTokens
from cenote.reduce.colbert_token_pooling.documents import PooledDocument as PooledDocument
from cenote.reduce.colbert_token_pooling.documents import Variant as Variant
from cenote.reduce.colbert_token_pooling.documents import pool_document as pool_document
from cenote.reduce.colbert_token_pooling.documents import pool_documents as pool_documents
from cenote.reduce.colbert_token_pooling.documents import real_documents as real_documents
from cenote.reduce.colbert_token_pooling.reducers import HierarchicalPooling as HierarchicalPooling
from cenote.reduce.colbert_token_pooling.reducers import KMeansPooling as KMeansPooling
from cenote.reduce.colbert_token_pooling.reducers import SequentialPooling as SequentialPooling
