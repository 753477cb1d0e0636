import torch
from lavis.tasks.base_task import BaseTask
from lavis.tasks.multimodal_classification import MultimodalClassificationTask
from lavis.tasks.retrieval import RetrievalTask
from torch import nn

from lavis_aurora.tasks import RetrievalAuroraTask
from lavis_aurora.training.lavis_tasks import runnable_task
from lavis_aurora.training.loop import AuroraTrainMixin


def test_tasks_of_this_package_stay_as_they_are():
    assert runnable_task(RetrievalAuroraTask) is RetrievalAuroraTask


def test_lavis_tasks_train_by_our_loop_and_keep_their_own_metrics():
    for cls, shards in ((RetrievalTask, False), (MultimodalClassificationTask, True)):
        task = runnable_task(cls)
        assert issubclass(task, cls) and task.__name__ == cls.__name__
        assert task._train_inner_loop is AuroraTrainMixin._train_inner_loop
        assert task.after_evaluation is cls.after_evaluation
        assert task.shards_evaluation is shards


def test_lavis_tasks_evaluate_on_the_cpu():
    class Predicts(nn.Linear):
        def predict(self, samples):
            return {"predictions": self(samples["x"]), "targets": samples["label"]}

    batch = {"x": torch.eye(2), "label": torch.tensor([0, 1]), "instance_id": ["a", "b"], "image_id": ["a", "b"]}
    task = runnable_task(MultimodalClassificationTask)()
    results = task.evaluation(Predicts(2, 2), [batch])
    assert [row["instance_id"] for row in results] == ["a", "b"]
    assert issubclass(type(task), BaseTask)
