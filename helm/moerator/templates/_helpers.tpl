{{- define "moerator.labels" -}}
app.kubernetes.io/name: moerator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
{{- define "moerator.selector" -}}
app.kubernetes.io/name: moerator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "moerator.account" -}}
{{ .Values.serviceAccount.name | default .Release.Name }}
{{- end }}
{{- /* What the operator does to namespaced objects; the same rules whether bound once or per namespace. */ -}}
{{- define "moerator.rules" -}}
- apiGroups: [moerator.dev]
  resources: [moejobs, moeservices, moedrills]
  verbs: [get, list, watch]
- apiGroups: [moerator.dev]
  resources: [moejobs/status, moeservices/status, moedrills/status, expertmaps/status]
  verbs: [patch]
- apiGroups: [moerator.dev]
  resources: [moejobs]
  verbs: [delete]
- apiGroups: [moerator.dev]
  resources: [expertmaps]
  verbs: [get, list, watch, create, patch, delete]
# Owner references that block deletion need this right where that admission plugin is on.
- apiGroups: [moerator.dev]
  resources: [moejobs/finalizers, moeservices/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [get, create, patch]
{{- end }}
