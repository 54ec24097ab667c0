{{- define "core-rerank.selector" -}}
app.kubernetes.io/name: core-rerank
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "core-rerank.labels" -}}
{{ include "core-rerank.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
