"""What stands for data, stores, denoisers and students here has what the protocols ask for, as mypy finds in lint."""

from __future__ import annotations

from collections.abc import Sequence

import test_device
import test_memory
import test_student
import test_support
import test_tokens_closed_form
import toys
from test_consistency_closed_form import FlowTeacher
from test_dmd2_closed_form import Spy as Dmd2Spy
from test_family import On
from test_hyper_sd_closed_form import Known
from test_phased_closed_form import GaussianCritic
from test_siblings_closed_form import Affine, Guided
from test_siblings_closed_form import Spy as SiblingsSpy
from test_sid_closed_form import Spy as SidSpy

from fewstep.data import Ahead, Batches, Rows
from fewstep.data.blank import Blank
from fewstep.data.cache import Store
from fewstep.data.pairs import Pairs
from fewstep.denoiser import Denoiser, NetDenoiser, ScheduleView
from fewstep.methods.disback import Target
from fewstep.router import Conditions, RoutedDenoiser, RoutedStudent
from fewstep.student import EntryStudent, Sampler, Student
from fewstep.teachers.analytic import GaussianMixture
from fewstep.token_students import CausalStudent, Generator, ParallelStudent
from fewstep.tokens import CodebookDenoiser
from fewstep.trainer import Data

DATA: Sequence[type[Data]] = [Batches, Ahead, Blank, test_memory.Counting, test_support.Data]
ROWS: Sequence[type[Rows]] = [Store, Pairs, toys.Rows, test_device.Rows]
CONDITIONS: Sequence[type[Conditions]] = [Store, toys.Rows]
STUDENTS: Sequence[type[Sampler]] = [Student, EntryStudent, RoutedStudent]
DENOISERS: Sequence[type[Denoiser]] = [
    NetDenoiser,
    ScheduleView,
    GaussianMixture,
    RoutedDenoiser,
    Target,
    CodebookDenoiser,
    CausalStudent,
    ParallelStudent,
    Generator,
]
DOUBLES: Sequence[type[Denoiser]] = [
    Affine,
    Dmd2Spy,
    GaussianCritic,
    Known,
    Guided,
    On,
    SiblingsSpy,
    SidSpy,
    FlowTeacher,
    test_student.Recorder,
    test_tokens_closed_form.Exact,
    test_tokens_closed_form.Spy,
]
