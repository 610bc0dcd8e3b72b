//! The settings in force for a service, merged from `Mesh`, `Service` and `Node` documents.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::{
    CaptureSettings, ConnectionLimits, Documents, LoadBalancing, MtlsMode, MtlsSettings, NodeDocument,
    Outbound, OutlierDetection, PlacedDocument, Retry, Timeouts,
};
use crate::{Place, ServiceName};

/// The settings that `Mesh`, `Service` and `Node` documents share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    pub load_balancing: Option<LoadBalancing>,
    pub timeouts: Timeouts,
    pub retry: Option<Retry>,
    pub outlier_detection: Option<OutlierDetection>,
    pub connection_limits: Option<ConnectionLimits>,
    pub capture: CaptureSettings,
    pub mtls: Option<MtlsMode>,
    /// The document that set each value, by the value's name. A value without an entry has its built-in
    /// default.
    pub origins: BTreeMap<&'static str, Origin>,
}

/// The document that set a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    pub document: String,
    pub place: Place,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.document, self.place)
    }
}

impl Documents {
    /// Returns the settings of `service` as called by a node: `Node` over `Service` over `Mesh`, value by
    /// value.
    ///
    /// `nodes` are the `Node` documents that select the caller; later ones take precedence.
    pub fn settings(&self, service: &ServiceName, nodes: &[Arc<PlacedDocument<NodeDocument>>]) -> Settings {
        let mut settings = Settings::default();
        if let Some(mesh) = &self.mesh {
            let layer = SettingsLayer::of(&mesh.load_balancing, &mesh.timeouts, &mesh.retry).with(
                &mesh.outlier_detection,
                &mesh.connection_limits,
                &mesh.capture,
                &mesh.mtls,
            );
            settings.overlay(layer, || Origin { document: "Mesh".to_owned(), place: mesh.place.clone() });
        }
        if let Some(service) = self.services.get(service) {
            let layer = SettingsLayer::of(&service.load_balancing, &service.timeouts, &service.retry).with(
                &service.outlier_detection,
                &service.connection_limits,
                &service.capture,
                &service.mtls,
            );
            let document = format!("Service `{}`", service.name);
            settings.overlay(layer, || Origin { document: document.clone(), place: service.place.clone() });
        }
        settings.overlay_nodes(nodes);
        settings
    }

    /// Returns a node's policy for captured connections to addresses of no service: `Node` over `Mesh` over
    /// the default.
    ///
    /// `nodes` are the `Node` documents that select the node; later ones take precedence.
    pub fn outbound(&self, nodes: &[Arc<PlacedDocument<NodeDocument>>]) -> Outbound {
        let layer = nodes.iter().rev().find_map(|node| node.outbound);
        layer.or(self.mesh.as_ref().and_then(|mesh| mesh.outbound)).unwrap_or_default()
    }
}

/// The settings of one document. `None` keeps the value of a document with lower precedence.
#[derive(Default)]
struct SettingsLayer<'a> {
    load_balancing: Option<&'a LoadBalancing>,
    timeouts: Timeouts,
    retry: Option<&'a Retry>,
    outlier_detection: Option<OutlierDetection>,
    connection_limits: Option<ConnectionLimits>,
    capture: CaptureSettings,
    mtls: Option<MtlsSettings>,
}

impl<'a> SettingsLayer<'a> {
    fn of(balancing: &'a Option<LoadBalancing>, times: &Option<Timeouts>, retry: &'a Option<Retry>) -> Self {
        SettingsLayer {
            load_balancing: balancing.as_ref(),
            timeouts: times.unwrap_or_default(),
            retry: retry.as_ref(),
            ..SettingsLayer::default()
        }
    }

    fn with(
        mut self,
        outliers: &Option<OutlierDetection>,
        limits: &Option<ConnectionLimits>,
        capture: &Option<CaptureSettings>,
        mtls: &Option<MtlsSettings>,
    ) -> Self {
        self.outlier_detection = *outliers;
        self.connection_limits = *limits;
        self.capture = capture.unwrap_or_default();
        self.mtls = *mtls;
        self
    }
}

impl Settings {
    /// Returns the mode of mTLS; off if no document sets it.
    pub fn mtls_mode(&self) -> MtlsMode {
        self.mtls.unwrap_or_default()
    }

    /// Returns the settings of the `Node` documents `nodes` for every service; later ones take precedence.
    pub fn of_nodes(nodes: &[Arc<PlacedDocument<NodeDocument>>]) -> Settings {
        let mut settings = Settings::default();
        settings.overlay_nodes(nodes);
        settings
    }

    /// Returns a text that is equal for equal values, whichever documents set them.
    pub fn content_key(&self) -> String {
        let Settings {
            load_balancing,
            timeouts,
            retry,
            outlier_detection,
            connection_limits,
            capture,
            mtls,
            origins: _,
        } = self;
        format!(
            "{load_balancing:?} {timeouts:?} {retry:?} {outlier_detection:?} {connection_limits:?} {capture:?} {mtls:?}"
        )
    }

    fn overlay_nodes(&mut self, nodes: &[Arc<PlacedDocument<NodeDocument>>]) {
        for node in nodes {
            let layer = SettingsLayer::of(&node.load_balancing, &node.timeouts, &node.retry).with(
                &node.outlier_detection,
                &node.connection_limits,
                &node.capture,
                &node.mtls,
            );
            let document = format!("Node `{}`", node.selector());
            self.overlay(layer, || Origin { document: document.clone(), place: node.place.clone() });
        }
    }

    fn overlay(&mut self, layer: SettingsLayer<'_>, origin: impl Fn() -> Origin) {
        let Settings {
            load_balancing,
            timeouts,
            retry,
            outlier_detection,
            connection_limits,
            capture,
            mtls,
            origins,
        } = self;
        let mut take = |name: &'static str, given: bool| {
            if given {
                origins.insert(name, origin());
            }
            given
        };
        if take("load_balancing", layer.load_balancing.is_some()) {
            *load_balancing = layer.load_balancing.cloned();
        }
        if take("timeouts.connect", layer.timeouts.connect.is_some()) {
            timeouts.connect = layer.timeouts.connect;
        }
        if take("timeouts.request", layer.timeouts.request.is_some()) {
            timeouts.request = layer.timeouts.request;
        }
        if take("timeouts.idle", layer.timeouts.idle.is_some()) {
            timeouts.idle = layer.timeouts.idle;
        }
        if take("retry", layer.retry.is_some()) {
            *retry = layer.retry.cloned();
        }
        if take("outlier_detection", layer.outlier_detection.is_some()) {
            *outlier_detection = layer.outlier_detection;
        }
        if take("connection_limits", layer.connection_limits.is_some()) {
            *connection_limits = layer.connection_limits;
        }
        if take("capture.percent", layer.capture.percent.is_some()) {
            capture.percent = layer.capture.percent;
        }
        if take("capture.on_loss", layer.capture.on_loss.is_some()) {
            capture.on_loss = layer.capture.on_loss;
        }
        if take("mtls.mode", layer.mtls.is_some()) {
            *mtls = layer.mtls.map(|mtls| mtls.mode);
        }
    }
}
