from tests.jobs.extract.conftest import items, photos, vit

__all__ = ["items", "photos", "vit"]
