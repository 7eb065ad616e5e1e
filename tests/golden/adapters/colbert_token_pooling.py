from torch import Tensor

from cenote.reduce.colbert_token_pooling.documents import pool_documents
from tests.golden.cases import Case, adapter

BOTH = "colbert.modeling.checkpoint.pool_embeddings_hierarchical and pylate.models.ColBERT.pool_embeddings_hierarchical"


@adapter("colbert-token-pooling", BOTH)
def pooled(case: Case) -> dict[str, Tensor]:
    documents = list(case.inputs["flat"].split(case.inputs["lengths"].tolist()))
    found = {}
    for variant in ("colbert", "pylate"):
        bags, _ = pool_documents(
            documents, case.config["pool_factor"], case.config["protected_tokens"], variant=variant
        )
        found |= {f"{variant}_flat": bags.values, f"{variant}_lengths": bags.lengths()}
    return found
